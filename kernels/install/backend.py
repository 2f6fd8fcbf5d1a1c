"""setuptools' build backend, behind a check that pip leaves out with --no-build-isolation.

A fresh environment has no setuptools (Python 3.12 and newer) or one that refuses pyproject.toml with a page of
text (3.11), so what is missing is said here, before setuptools is asked for anything.
"""

import sys

NEEDED = 77  # as in pyproject.toml: the first that knows `license = "MIT"` and license-files

try:
    from setuptools import __version__ as found
except ImportError:
    found = ""
if int(found.partition(".")[0] or 0) < NEEDED:
    raise SystemExit(
        f"mwpb-fast: error: setuptools {NEEDED} or newer is needed, and here is {found or 'none'}; run first: "
        f"{sys.executable} -m pip install 'setuptools>={NEEDED}' cmake ninja"
    )

from setuptools.build_meta import *  # noqa: E402, F403
