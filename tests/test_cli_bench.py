"""The command bench: the scripts of a checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from mwpb_fast import cli
from mwpb_fast.cli import commands


def test_bench(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "mwpb_fast" / "cli" / "commands.py"))
    assert cli.main(["bench"]) == 2
    assert "needs a checkout" in capfd.readouterr().err
    (tmp_path / "bench").mkdir()
    script = "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n    sys.exit(3)\n"
    (tmp_path / "bench" / "kernels.py").write_text(script)
    (tmp_path / "bench" / "helpers.py").write_text("X = 1\n")  # not to be run
    assert cli.main(["bench", "kernels", "--json", "x"]) == 3
    assert capfd.readouterr().out == "['--json', 'x']\n"
    assert cli.main(["bench", "nope"]) == 2
    assert "there are kernels\n" in capfd.readouterr().err
