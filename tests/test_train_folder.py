"""The folder of a run: one process at a time, what may change when the run goes on, and beginning anew."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mwpb_fast import cli, train
from mwpb_fast.config import Config, ConfigError, recipe, resolve
from mwpb_fast.config.dependence import FREE, LATER
from mwpb_fast.options import values_of
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.folder import clear

TINY = ["--epochs=1", "--warmup_epochs=0", "--data.subset=128", "--model.name=smallresnet-8", "--attack.steps=1"]


def tiny(*options: str) -> Config:
    return resolve(recipe("digits.mwpb_at"), [], [*TINY, *options])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# one process at a time ------------------------------------------------------------------------------------------
def test_second_process_is_refused_until_the_first_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "digits.mwpb_at", *TINY, "--epochs=5000", "--no-evaluate", "--quiet", "--out", str(tmp_path)]
    first = subprocess.Popen([sys.executable, "-m", "mwpb_fast", *words])
    try:
        while not checkpoint.existing(tmp_path / "checkpoints", "last"):
            assert first.poll() is None
            time.sleep(0.05)
        assert cli.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "another process is training this run" in line
    finally:
        first.kill()
        first.wait()
    found = checkpoint.read_newest(tmp_path / "checkpoints", "last")
    assert found is not None
    record = train.run(tiny(f"--epochs={found[1]['epoch']}"), tmp_path, quiet=True)
    assert record["epoch"] == found[1]["epoch"]


def test_other_process_keeps_its_run_from_one_that_would_begin_anew(tmp_path: Path) -> None:
    train.run(tiny(), tmp_path, quiet=True)
    before = files(tmp_path)
    with (tmp_path / "train.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            train.run(tiny(), tmp_path, resume=False, quiet=True)
    assert files(tmp_path) == before


def test_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(file: object, how: int) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    assert train.run(tiny(), tmp_path, quiet=True)["epoch"] == 1


# going on -------------------------------------------------------------------------------------------------------
def test_what_best_is_chosen_by_may_not_change(tmp_path: Path) -> None:
    train.run(tiny(), tmp_path, quiet=True)
    with pytest.raises(ConfigError, match=r"other settings \(evaluation\)"):
        train.run(tiny("--epochs=2", "--evaluation.eps=8/255"), tmp_path, quiet=True)


def test_what_leaves_the_run_as_it_is_may_change(tmp_path: Path) -> None:
    train.run(tiny(), tmp_path, quiet=True)
    words = ["--evaluation.attacks=[natural]", "--evaluation.step_size=1/255", "--evaluation.batch_size=9"]
    words += ["--evaluation.subset=5", "--evaluation.costly_subset=5", "--evaluation.validate_every=2"]
    words += ["--data.loader=resident", "--data.threads=3", "--data.dir=elsewhere", "--precision.device=cpu"]
    assert train.run(tiny("--epochs=2", *words), tmp_path, quiet=True)["epoch"] == 2


def test_what_may_change_is_named_as_it_is_on_the_command_line() -> None:
    names = {name for name, _ in values_of(tiny())}
    assert names | {"recipe"} >= FREE | LATER


# beginning anew -------------------------------------------------------------------------------------------------
RESULTS = (
    "results.json",
    "curves.png",
    "report.html",
    "radii.png",
    "evaluation-best.json",
    "evaluation-last.json",
    "evaluation-best/pgd20x5-0123456789ab-00000.json",
    "trust-best.json",
    "trust-last.md",
    "engine.json",
    ".radii.json.x1y2_z3w.tmp",
    "checkpoints/last-00007-0000003.pt.sha256",
    "checkpoints/.best-00007-0000000.pt.abcdefgh.tmp",
    "checkpoints/evaluation-best-00001-0000000.json",
    "checkpoints/evaluation-best-00001-0000000/natural-0123456789ab-00000.json",
)
MINE = (
    "notes.md",
    "evaluation-best-of-mine.json",
    "evaluation-last/thoughts.txt",
    "trust-me.json",
    "my-radii.json",
    "checkpoints/best.pt",
    "checkpoints/published-00001-0000000.pt",
    "tensorboard/layout.json",
    "plots/curves.png",
)


def test_beginning_anew_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    train.run(tiny(), tmp_path, quiet=True)
    old = {name for name in files(tmp_path) if "tfevents" in name}
    assert old
    for name in (*RESULTS, *MINE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    clear(tmp_path)
    assert files(tmp_path) == {*MINE, "train.lock"}
    assert not (tmp_path / "evaluation-best").exists()
    assert not (tmp_path / "checkpoints" / "evaluation-best-00001-0000000").exists()


def test_run_that_cannot_begin_leaves_the_old_one(tmp_path: Path) -> None:
    train.run(tiny(), tmp_path, quiet=True)
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.name"):
        train.run(tiny("--model.name=smallresnet-0"), tmp_path, resume=False, quiet=True)
    assert files(tmp_path) == before
    for name in (*RESULTS, *MINE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    train.run(tiny("--seed=9"), tmp_path, resume=False, quiet=True)
    assert set(RESULTS) & files(tmp_path) == {"engine.json"}  # which the new run has written, too
    assert (tmp_path / "engine.json").read_text() != "old"
    assert set(MINE) <= files(tmp_path)
    found = checkpoint.read_newest(tmp_path / "checkpoints", "last")
    assert found is not None
    assert found[1]["config"]["seed"] == 9
