"""What a run is watched for: divergence and catastrophic overfitting, which may send it back, and hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import StopAfter, assert_same, final_state, tiny

from mwpb_fast import cli, train
from mwpb_fast.config import GuardConfig
from mwpb_fast.evaluation import validation
from mwpb_fast.runs import checkpoint, guards, trace
from mwpb_fast.runs.log import read_records
from mwpb_fast.system.signals import Interrupted
from mwpb_fast.system.watchdog import Watchdog

SMALL = ("--data.subset=128", "--warmup_epochs=0")


def rows(*losses: float) -> torch.Tensor:
    found = torch.zeros(len(losses), trace.COLUMNS)
    found[:, 0] = torch.tensor(losses)
    return found


@pytest.mark.parametrize(
    ("losses", "steps", "found"),
    [
        ((1, 200, 300, 2), 2, "up to batch 2 (300)"),
        ((1, 200, 300, float("inf")), 3, "up to batch 3 (inf)"),
        ((200, 1, 200, 1), 2, ""),
        ((200,), 2, ""),
        ((200, 200, 200, 200), 100, "in 4 steps on end, up to batch 3"),  # all of a short epoch
        ((200, float("nan"), 200, 200), 3, ""),  # those are counted as bad steps
    ],
)
def test_divergence(losses: tuple[float, ...], steps: int, found: str) -> None:
    said = guards.diverged(rows(*losses), 7, 4, GuardConfig(loss=100, loss_steps=steps))
    assert bool(said) == bool(found)
    assert found in said
    assert not said or said.startswith("epoch 7: diverged")
    assert not guards.diverged(rows(*losses), 7, 4, GuardConfig(loss=0, loss_steps=steps))


def validated(epoch: int, robust: float, fgsm: float) -> dict[str, Any]:
    return {"epoch": epoch, "robust": robust, "fgsm": fgsm}


def test_catastrophic_overfitting() -> None:
    earlier = [{"epoch": 1}, validated(2, 40, 45), validated(3, 41, 46), {"epoch": 4, "robust": None, "fgsm": 3}]
    guard = GuardConfig()
    said = guards.collapsed(validated(5, 3, 83), earlier, guard)
    assert said == (
        "epoch 5: catastrophic overfitting: on the validation images PGD-10 accuracy is 3.0 %, down from 41.0 % "
        "in epoch 3, while FGSM accuracy rose from 46.0 % to 83.0 %"
    )
    assert not guards.collapsed(validated(5, 3, 10), earlier, guard)  # both fell: something else
    assert not guards.collapsed(validated(5, 30, 83), earlier, guard)
    assert not guards.collapsed({"epoch": 5}, earlier, guard)  # none was due
    assert not guards.collapsed(validated(5, 3, 83), [], guard)
    assert not guards.collapsed(validated(5, 3, 83), earlier, GuardConfig(collapse=0))


def test_fgsm_is_measured_beside_pgd_and_changes_no_weight(tmp_path: Path) -> None:
    record = train.run(tiny("--epochs=1", *SMALL), tmp_path / "a", quiet=True)
    assert 0 <= record["robust"] <= record["fgsm"] <= record["natural"] <= 100
    assert "fgsm" not in train.run(tiny("--epochs=1", *SMALL, "--guard.collapse=0"), tmp_path / "b", quiet=True)
    assert_same(final_state(tmp_path / "a")["model"], final_state(tmp_path / "b")["model"])


@pytest.fixture
def collapse(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Accuracies under PGD that fall in epoch 3 while those under FGSM rise, as long as the learning rate is the
    first; the rates of the epochs so far."""
    rates: list[float] = []
    real = train.set_learning_rate

    def note_rate(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        real(optimizer, rate)

    def right(model: Any, batches: Any, eps: float, epoch: int, *more: Any) -> torch.Tensor:
        fell = epoch >= 3 and rates[-1] == rates[0]
        return torch.tensor([90.0, 5.0, 80.0, 100.0] if fell else [90.0, 40.0, 45.0, 100.0])

    monkeypatch.setattr(train, "set_learning_rate", note_rate)
    monkeypatch.setattr(validation, "right", right)
    return rates


def test_a_collapse_is_told_and_the_run_goes_on(
    tmp_path: Path, collapse: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(tiny("--epochs=4", *SMALL), tmp_path, quiet=True)
    told = [r.get("guard", "") for r in read_records(tmp_path / "metrics.jsonl")]
    assert [text.partition(":")[0] for text in told] == ["", "", "epoch 3", "epoch 4"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1:3] for line in lines] == [
        [f" epoch {n}", " catastrophic overfitting"] for n in (3, 4)
    ]


def test_a_collapse_ends_the_run(
    tmp_path: Path, collapse: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "digits.mwpb_at",
        *SMALL,
        "--model.name=smallresnet-4",
        "--epochs=4",
        "--optim.drops=[]",
        "--guard.action=stop",
    ]
    assert cli.main([*words, "--quiet", "--no-evaluate", f"--out={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mwpb-fast: error: epoch 3: catastrophic overfitting")
    assert final_state(tmp_path)["epoch"] == 3  # the state before it
    assert cli.main([*words, "--guard.action=tell", "--quiet", "--no-evaluate", f"--out={tmp_path}"]) == 0


def test_a_run_goes_back_with_a_lower_rate_and_exactly_so_after_a_stop(
    tmp_path: Path, collapse: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("--epochs=4", *SMALL, "--guard.action=roll_back", "--guard.rate=0.25")
    train.run(config, tmp_path / "whole", quiet=True)
    assert collapse == [collapse[0]] * 3 + [collapse[0] / 4] * 2
    assert [r["epoch"] for r in read_records(tmp_path / "whole" / "metrics.jsonl")] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert "going back to last-00003-0000000.pt, with the learning rate times 0.25" in said
    whole = final_state(tmp_path / "whole")
    assert whole["rollbacks"] == 1
    batches = len(whole["trace"])
    for cut in (3 * batches + 1, 4 * batches + 1):  # in the third epoch when it is done again, and in the fourth
        collapse.clear()
        place = tmp_path / str(cut)
        trainer = train.Trainer(config, place, StopAfter(cut), quiet=True)  # type: ignore[arg-type]
        with pytest.raises(Interrupted):
            trainer.train()
        first = collapse[0]
        collapse[:] = [first]  # what the run was begun with
        train.run(config, place, quiet=True)
        assert_same(final_state(place), whole)


def test_a_run_goes_back_so_often_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(model: Any, batches: Any, eps: float, epoch: int, *more: Any) -> torch.Tensor:
        return torch.tensor([90.0, 40.0 - 20 * (epoch > 1), 45.0 + epoch, 100.0])

    monkeypatch.setattr(validation, "right", right)
    config = tiny("--epochs=3", *SMALL, "--guard.action=roll_back", "--guard.rollbacks=2")
    with pytest.raises(guards.GuardError, match=r"epoch 2: catastrophic.*the run has gone back 2 times"):
        train.run(config, tmp_path, quiet=True)


def test_divergence_in_the_first_epoch_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    config = tiny("--epochs=2", *SMALL, "--guard.action=roll_back", "--guard.loss=1e-6")
    with pytest.raises(guards.GuardError, match=r"epoch 1: diverged: .*no state before it to go back to"):
        train.run(config, tmp_path, quiet=True)


def test_divergence_goes_back_to_the_start_of_its_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also past a damaged state, which is named."""
    train.run(tiny("--epochs=2", *SMALL), tmp_path, quiet=True)
    newest = checkpoint.existing(tmp_path / "checkpoints", "last")[0]

    def damage(*words: Any) -> Any:
        newest.write_bytes(b"damaged")
        monkeypatch.undo()
        return "epoch 3: diverged"

    monkeypatch.setattr(guards, "diverged", damage)
    config = tiny("--epochs=3", *SMALL, "--guard.action=roll_back")
    assert train.run(config, tmp_path, quiet=True)["epoch"] == 3
    err = capsys.readouterr().err
    assert "last-00003-0000000.pt: damaged" in err
    assert "going back to last-00002-0000000.pt" in err
    assert [r["epoch"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]


# hangs -----------------------------------------------------------------------------------------------------------
def test_a_watchdog_waits_for_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts twenty looks since the last."""
    looks, called = 0, list[int]()
    dog = Watchdog(1.0, lambda: called.append(looks))

    class Waiting:
        def wait(self, seconds: float) -> bool:
            nonlocal looks
            looks += 1
            if looks == 15:
                dog.beat()
            return False

    monkeypatch.setattr(dog, "_over", Waiting())
    dog._watch()
    assert called == [15 + 20]


def test_a_watchdog_is_a_thread_for_the_time_of_a_block() -> None:
    called = threading.Event()
    with Watchdog(0.01, called.set):
        assert called.wait(60)
    for seconds in (0.0, 3600.0):
        with Watchdog(seconds, called.set):
            running = [thread for thread in threading.enumerate() if thread.name == "mwpb-watchdog"]
        assert len(running) == bool(seconds)
        for thread in running:
            thread.join(60)
            assert not thread.is_alive()


def test_a_step_that_hangs_is_named_with_its_stack_and_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hanging, over, statuses = threading.Event(), threading.Event(), list[int]()

    def leave(status: int) -> None:
        statuses.append(status)
        over.set()

    def watch(self: Watchdog) -> None:
        assert hanging.wait(60)
        self.hung()

    real = train.Step.__call__
    calls: Iterator[int] = iter(range(10**6))

    def the_ninth_hangs(self: Any, *words: Any) -> Any:
        if next(calls) == 8:
            hanging.set()
            assert over.wait(60)
            raise InterruptedError("ended")
        return real(self, *words)

    train.run(tiny("--epochs=1", *SMALL), tmp_path, quiet=True)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(Watchdog, "_watch", watch)
    monkeypatch.setattr(train.Step, "__call__", the_ninth_hangs)
    with pytest.raises(InterruptedError):
        train.run(tiny("--epochs=9", *SMALL, "--guard.hang=7"), tmp_path, quiet=True)
    assert statuses == [1]
    err = capfd.readouterr().err
    newest = checkpoint.existing(tmp_path / "checkpoints", "last")[0].name
    line = err.splitlines()[-1]
    assert line.startswith("mwpb-fast: error: epoch ")
    assert "nothing has come to its end for 7 s (guard.hang), at threading.py" in line
    assert line.endswith(f"the same command goes on from {newest}")
    for stacks in (err, (tmp_path / "hang.txt").read_text(encoding="utf-8")):
        assert "in the_ninth_hangs" in stacks
    monkeypatch.undo()
    assert train.run(tiny("--epochs=6", *SMALL), tmp_path, quiet=True)["epoch"] == 6


HANGING = """
import time
import torch
from dataclasses import dataclass
from mwpb_fast.objectives import at

calls = []

class Config(at.Config):
    def build(self):
        return Hanging()

class Hanging(at.AT if hasattr(at, "AT") else type(at.Config().build())):
    def outer(self, *words, **more):
        calls.append(1)
        if len(calls) == 12:
            time.sleep(10**6)
        return super().outer(*words, **more)
"""


@pytest.mark.slow
def test_the_whole_command_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "hanging").mkdir()
    (tmp_path / "hanging" / "mine.py").write_text(HANGING, encoding="utf-8")
    words = ["train", "digits.at", "--objective=hanging.mine", "--data.subset=64", "--data.batch_size=16",
             "--model.name=smallresnet-4", "--epochs=50", "--guard.hang=20", "--out=run"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mwpb_fast", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "(guard.hang), at mine.py" in done.stderr.splitlines()[-1]
    assert checkpoint.read_newest(tmp_path / "run" / "checkpoints", "last") is not None
