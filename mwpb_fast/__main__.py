"""`python -m mwpb_fast`: the same as `mwpb-fast`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # Python put the current folder first, where a yaml.py would stand for PyYAML
        sys.path.append(sys.path.pop(0))
    from mwpb_fast.cli import main

    sys.exit(main())
