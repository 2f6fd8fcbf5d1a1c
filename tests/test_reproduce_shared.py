"""Processes that share the runs of a table: each is made once, and a dead process's run is gone on with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduce_cases import natural, until
from test_reproduce_runs import DIGITS, assert_same, reproduce

from mwpb_fast import cli, data, train
from mwpb_fast.reproduce import execute, render
from mwpb_fast.runs.log import read_records


def started(work: Any, *arguments: Any) -> Any:
    """A process that does that, and ends with what it gives."""

    def child() -> None:
        torch.set_num_threads(1)  # the threads of the parent are not there any more
        render.draw = lambda *arguments: ([], "")  # the pictures would take most of the time
        os._exit(work(*arguments))

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    return process


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What every process would import by itself."""
    import scipy.special  # noqa: F401

    data.load_split(data.Config(name="digits"), "test")


def ended(*processes: Any) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def made_up(out: Path, log: Path, *words: str, hangs: bool = False, fails: str = "", meets: bool = False) -> int:
    """`reproduce` with a training that leaves a line in `log`, and hangs, fails, or waits for another one."""

    def training(run: Any, prefix: str, quiet: bool) -> None:
        if run.state() == "done":
            return
        print(prefix, flush=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{run.name}\n")
        while hangs:
            time.sleep(0.01)
        if meets:
            until(lambda: len(log.read_text(encoding="utf-8").splitlines()) > 1)
        if fails and fails in run.name:
            until((out / "fail").exists)
            raise train.TrainingError("epoch 1: loss not finite")
        natural(run, 50.0, 50.0)

    execute._run = training
    return cli.main(["reproduce", "table1", *DIGITS, "--attacks=natural", "--out", str(out), *words])


def test_each_run_is_made_once_and_a_dead_process_gives_back_what_it_claimed(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    dead = started(lambda: made_up(out, log, "--seeds=2", hangs=True))
    until(lambda: log.exists() and log.read_text())
    others = [started(made_up, out, log, "--seeds=2") for _ in range(2)]
    leaves = started(made_up, out, log, "--seeds=2", "--worker")
    assert ended(leaves) == [0]  # a worker does not wait for what others have
    until(lambda: len(log.read_text().splitlines()) == 4)
    time.sleep(0.1)
    assert [process.is_alive() for process in others] == [True, True]
    os.kill(dead.pid, signal.SIGKILL)
    assert ended(*others) == [0, 0]
    names = log.read_text().splitlines()
    assert sorted(names[1:]) == sorted({*names})  # the hanging one's is made once more, by one of the others
    assert len(names) == 5
    assert "4 of 4 runs are complete." in (out / "table1" / "table.md").read_text()
    assert not list(out.rglob("*.lock"))


def test_a_run_that_fails_is_tried_once_and_all_know_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    first = started(lambda: made_up(out, log, fails="control_at"))
    until(lambda: log.exists() and log.read_text())
    second = started(made_up, out, log)
    until(lambda: len(log.read_text().splitlines()) == 2)
    (out / "fail").touch()
    assert ended(first, second) == [1, 1]
    assert capfd.readouterr().err.count("table1.control_at seed 0 failed: epoch 1: loss not finite\n") == 2
    assert log.read_text().splitlines() == ["table1.control_at seed 0", "table1.mwpb_at seed 0"]
    assert "seed 0: failed: epoch 1: loss not finite" in (out / "table1" / "table.md").read_text()
    late = started(made_up, out, log, "--worker")  # belongs to those before
    assert ended(late) == [1]
    assert len(log.read_text().splitlines()) == 2
    anew = started(made_up, out, log)
    assert ended(anew) == [0]
    assert "2 of 2 runs are complete." in (out / "table1" / "table.md").read_text()


def test_the_processes_of_torchrun_share_the_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def rank(number: str) -> int:
        os.environ |= {"RANK": number, "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
        return made_up(out, log, "--seeds=2", meets=True)

    assert ended(*[started(rank, number) for number in ("1", "0")]) == [0, 0]
    assert len(log.read_text().splitlines()) == 4
    said = capfd.readouterr().out
    assert "rank 1: [" in said
    assert said.count("4 of 4 runs are complete.") == 1


@pytest.mark.slow
def test_a_killed_process_s_run_is_gone_on_with_by_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From its last checkpoint, to the same weights and the same table as if there had been one process."""
    words = ["--rows=mwpb_at", "--attacks=natural"]
    epochs = tmp_path / "epochs"

    def slowly() -> int:
        finish = train.Trainer._finish_epoch

        def slow(self: Any, *arguments: Any) -> None:
            finish(self, *arguments)
            self.writer.wait()
            epochs.write_text("1", encoding="utf-8")
            while True:
                time.sleep(0.01)

        train.Trainer._finish_epoch = slow  # type: ignore[method-assign]
        return reproduce(tmp_path / "shared", *words)

    killed = started(slowly)
    until(epochs.exists)
    other = started(reproduce, tmp_path / "shared", *words)
    alone = started(reproduce, tmp_path / "alone", *words)
    assert ended(alone) == [0]
    assert other.is_alive()
    os.kill(killed.pid, signal.SIGKILL)
    assert ended(other) == [0]
    said = capfd.readouterr().out
    assert "another process has it" in said
    assert_same(tmp_path / "alone", tmp_path / "shared")
    (records,) = (read_records(path) for path in (tmp_path / "shared").rglob("metrics.jsonl"))
    assert [record["epoch"] for record in records] == [1, 2, 3]
