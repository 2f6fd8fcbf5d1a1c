"""Shards of an evaluation shared by processes: each is attacked once, also where one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from mwpb_fast.evaluation.contract import Outcome
from mwpb_fast.evaluation.sharded import ShardedAttack
from mwpb_fast.system.lock import claims

SETTING: Any = SimpleNamespace(
    eps="1", step_size="1", norm="linf", seed=0, batch_size=9, precision=SimpleNamespace(dtype="fp32")
)


class Slow:
    """An attack that leaves a line for each time that it is run, and that one process never ends."""

    parameters: ClassVar[dict[str, Any]] = {}
    ball, stepped, forwards = True, True, 1

    def __init__(self, log: Path, hangs: bool = False) -> None:
        self.log, self.hangs = log, hangs

    def run(self, model: Any, x: Any, y: Any, index: torch.Tensor, setting: Any) -> Outcome:
        with self.log.open("a") as file:
            file.write(f"{int(index[0])}\n")
        while self.hangs:
            time.sleep(0.01)
        time.sleep(0.02)
        return Outcome(correct=index % 2 == 0)


def work(folder: Path, hangs: bool = False) -> None:
    attack: Any = Slow(folder / "log", hangs)
    sharded = ShardedAttack(
        "slow",
        attack,
        torch.arange(2000),
        lambda i: (i, i),
        SETTING,
        folder / "shards",
        {},
        [[0.0] * 9],
    )
    model: Any = SimpleNamespace(forwards=0, search=None, tick=lambda: None, with_room=lambda work: work())
    model.not_finite = torch.zeros(2, dtype=torch.int64)
    sharded.run(model, range(len(sharded.shards)))
    assert not sharded.unfinished


def started(*arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def until(ready: Any) -> None:
    for _ in range(3000):
        if ready():
            return
        time.sleep(0.01)
    raise AssertionError("it took too long")


def test_each_shard_is_attacked_once_and_a_dead_process_gives_back_what_it_claimed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    dead = started(tmp_path, True)
    until(lambda: log.exists() and log.read_text())
    workers = [started(tmp_path) for _ in range(3)]
    until(lambda: len(log.read_text().split()) == 8)  # all but the one that hangs are done
    time.sleep(0.1)
    assert len(log.read_text().split()) == 8
    os.kill(dead.pid, signal.SIGKILL)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == [0, *range(0, 2000, 250)]
    assert not list((tmp_path / "shards").glob("*.lock"))


def test_a_part_is_for_one_process_and_the_file_goes_with_the_last(tmp_path: Path) -> None:
    context, path = multiprocessing.get_context("fork"), tmp_path / "f.lock"

    def other(number: int) -> bool:
        end, theirs = context.Pipe()

        def ask() -> None:
            with claims(path) as claim, claim(number) as mine:
                theirs.send(mine)

        process = context.Process(target=ask)
        process.start()
        process.join(60)
        assert path.exists()  # the other process leaves it to this one
        return bool(end.recv())

    with claims(path) as claim:
        with claim(3) as mine:
            assert mine
            assert not other(3)
            assert other(4)
        assert other(3)
    assert not path.exists()
