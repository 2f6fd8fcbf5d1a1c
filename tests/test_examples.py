"""The examples run as they stand, small; each is short."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from mwpb_fast import cli
from mwpb_fast.config import ConfigError
from mwpb_fast.options import configure

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LONG = {"compiled.py": pytest.mark.slow}  # a compiler runs
SCRIPTS = [pytest.param(p, marks=LONG.get(p.name, ()), id=p.name) for p in sorted(EXAMPLES.glob("*.py"))]
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_told_of(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    assert (path.name if path.parent == EXAMPLES else path.parent.name) in README


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--small"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_what_is_added_in_one_file_each_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"^ {4}mwpb-fast (train .*)$", README, re.MULTILINE)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    config = configure(line.split()[1], {}, ["--budget=own.floored", "--budget.floor=0.75"])
    assert config.budget.floor == 0.75
    with pytest.raises(ConfigError):
        configure(line.split()[1], {}, ["--objective=own.paired", "--natural_pass=true"])
    small = ["--epochs", "2", "--warmup_epochs", "1", "--data.subset", "64", "--no-evaluate", "--quiet"]
    assert cli.main([*line.split(), *small, "--out", "run"]) == 0
    assert (tmp_path / "run" / "radii.json").exists()
