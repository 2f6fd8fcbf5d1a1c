"""Runs as jobs through submitit: real ones on this machine, saved and put back into the queue, or refused."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from reproduce_cases import natural, runs_of, until

from mwpb_fast import cli
from mwpb_fast.reproduce import launch
from mwpb_fast.reproduce.failures import NOTE

DIGITS = ["--data.name=digits", "--data.pad=1", "--attacks=natural", "--rows=mwpb_at", "--seeds=2"]

# a command that counts how often it was begun, saves at SIGUSR1, and is done the second time
COMMAND = """
import pathlib, signal, sys, time
begun = pathlib.Path("begun")
signal.signal(signal.SIGUSR1, lambda *_: (pathlib.Path("saved").touch(), sys.exit(138)))
begun.write_text(begun.read_text() + "x" if begun.exists() else "x")
while begun.read_text() == "x":
    time.sleep(0.02)
"""


class Interrupting:
    """A job during whose wait somebody presses Ctrl-C."""

    def __init__(self, job: Any) -> None:
        self.cancel = job.cancel

    def done(self) -> bool:
        raise KeyboardInterrupt


def children(number: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


def test_a_job_whose_time_is_over_saves_and_goes_on_in_the_next(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    script = tmp_path / "script"
    script.write_text(f"#!{sys.executable}\n{COMMAND}", encoding="utf-8")
    script.chmod(0o755)
    made = launch.executor(tmp_path / "jobs", "test", "local", {"timeout_min": "5"})
    worker = launch.Worker(["reproduce"], str(tmp_path), program=[str(script)])
    (job,) = launch.submit(made, worker, 1)
    begun = tmp_path / "begun"
    until(begun.exists)
    (task,) = children(int(job.job_id))
    os.kill(task, signal.SIGUSR2)  # as the controller does, and SLURM
    until(lambda: begun.read_text() == "xx")
    assert (tmp_path / "saved").exists()
    assert launch.wait([job]) == {}
    (tmp_path / "saved").unlink()
    begun.unlink()
    (job,) = launch.submit(made, worker, 1)
    until(begun.exists)
    with pytest.raises(KeyboardInterrupt):
        launch.wait([Interrupting(job)])
    until((tmp_path / "saved").exists)
    worker = launch.Worker(["reproduce"], str(tmp_path), program=["false"])
    (job,) = launch.submit(made, worker, 1)
    (failed,) = launch.wait([job]).values()
    assert "ended with status 1" in Path(failed.removeprefix("see ")).read_text(encoding="utf-8")


def on_slurm(monkeypatch: pytest.MonkeyPatch, folder: Path, answer: str = "echo Submitted batch job 17") -> Path:
    """A path with srun, and with an sbatch that keeps what it is given; what it keeps."""
    pytest.importorskip("submitit")
    for name, body in (("srun", "true"), ("sbatch", f'cat "$1" > "{folder}/given"; {answer}')):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "given"


def test_slurm_gets_a_job_for_each_run_with_all_that_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = on_slurm(monkeypatch, tmp_path / "bin"), tmp_path / "out"
    (run, other) = runs_of("table1", out, "mwpb_at", 2, (*DIGITS[:2], "--evaluation.attacks=natural"))
    run.folder.mkdir(parents=True)
    (run.folder / NOTE).write_text("earlier", encoding="utf-8")
    words = ["reproduce", "table1", *DIGITS, "--out", str(out)]
    launcher = ["--launcher", "submitit", "--slurm.partition", "x", "--slurm.gpus_per_node=1"]
    assert cli.main([*words, *launcher, "--slurm.additional_parameters", '{"reservation": "r"}']) == 0
    script = given.read_text(encoding="utf-8")
    for line in (
        "partition=x",
        "gpus-per-node=1",
        "reservation=r",
        "time=1440",
        "array=0-1%2",
        "signal=USR2@90",
    ):
        assert f"#SBATCH --{line}\n" in script, script
    assert "slurm: jobs 17_0, 17_1; their output is in" in capsys.readouterr().out
    assert not (run.folder / NOTE).exists()  # what failed is tried anew
    content = pickle.loads((out / "jobs" / "17_0_submitted.pkl").read_bytes())
    assert content.function.words == [*words, "--worker"]
    assert content._timeout_countdown == launch.TIMEOUTS
    for done in (run, other):
        natural(done, 1.0, 1.0)
    given.unlink()
    assert cli.main([*words, *launcher]) == 0
    assert "2 of 2 runs are complete" in capsys.readouterr().out
    assert not given.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--slurm.partition=x"], "--cluster, --jobs and --slurm. are for --launcher submitit"),
        (["--launcher=submitit", "--worker"], "takes no --worker"),
        (["--launcher=submitit", "--slurm.partitoin=x"], "Unknown argument 'partitoin' for executor 'slurm'"),
        (["--launcher=submitit", "--slurm.gpus_per_node=many"], "expected type <class 'int'>"),
        (["--launcher=submitit", "--slurm.time=1:00:00"], "--slurm.time takes minutes, not 1:00:00"),
        (["--launcher=submitit", "--cluster=local", "--slurm.qos=x"], "--slurm.qos has no effect"),
    ],
)
def test_what_cannot_be_launched_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Any, reason: str
) -> None:
    given = on_slurm(monkeypatch, tmp_path / "bin")
    assert cli.main(["reproduce", "table1", *DIGITS, "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not given.exists()


def test_without_submitit_without_slurm_and_where_slurm_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "table1", *DIGITS, "--out", str(tmp_path / "out"), "--launcher=submitit"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        assert cli.main(words) == 2
    assert "submitit is not installed; pip install 'mwpb-fast[sweeps]'\n" in capsys.readouterr().err
    given = on_slurm(monkeypatch, tmp_path / "bin", "echo no such partition >&2; exit 1")
    assert cli.main(words) == 1
    assert given.exists()
    error = capsys.readouterr().err
    assert "slurm: the jobs are refused: " in error
    assert "no such partition" in error
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(words) == 2
    assert "no SLURM here (no srun); --cluster local takes this machine\n" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_on_this_machine_share_the_runs_of_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    small = ["--data.flip=false", "--data.batch_size=32", "--subset=192", "--model=smallresnet-8",
             "--attack.steps=1", "--epochs=2", "--test-subset=20", "--quiet"]  # fmt: skip
    words = ["reproduce", "table1", *DIGITS, *small, "--out", str(tmp_path), "--device=cpu"]
    assert cli.main([*words, "--launcher=submitit", "--cluster=local", "--jobs=2"]) == 0
    assert "2 of 2 runs are complete." in capsys.readouterr().out
    logs = [path.read_text(encoding="utf-8") for path in (tmp_path / "jobs").glob("*.out")]
    assert len(logs) == 2
    assert sum(log.count(": training in") for log in logs) == 2
