"""How runs end and go on: the last model where nothing is held out, bad steps, stops, what draws, figures."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import TINY, StopAfter, assert_same, final_state, tiny

from mwpb_fast import cli, train
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import progress, read_records
from mwpb_fast.system.signals import Interrupted

OBJECTIVE = """
from dataclasses import dataclass

import torch
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Objective, ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    def build(self):
        return Outside()


class Outside(Objective):
    inner = staticmethod(cross_entropy)
    calls = 0

    def outer(self, model, x, x_adv, y, notes=None):
        self.calls += 1
        loss = torch.nn.functional.cross_entropy(model(x_adv).float(), y)
        return {result}
"""


def objective(folder: Path, patch: pytest.MonkeyPatch, name: str, result: str) -> str:
    """The option that takes an objective from outside, which returns `result` of the cross-entropy `loss`."""
    package = folder / f"{name}_outside"
    package.mkdir()
    (package / "mine.py").write_text(OBJECTIVE.format(result=result))
    patch.syspath_prepend(folder)
    for module in (package.name, f"{package.name}.mine"):
        patch.delitem(sys.modules, module, raising=False)
    return f"--objective={package.name}.mine"


def best(folder: Path) -> dict[str, Any]:
    found = checkpoint.read_newest(folder / "checkpoints", "best")
    assert found is not None
    return found[1]


def test_with_nothing_held_out_best_is_the_last_model_also_of_a_longer_run(tmp_path: Path) -> None:
    for epochs in (1, 3):
        train.run(tiny("--data.validation=0", f"--epochs={epochs}"), tmp_path, quiet=True)
        found, last = best(tmp_path), final_state(tmp_path)
        assert found["epoch"] == epochs
        assert all((found["model"][name] == value).all() for name, value in last["model"].items())
        assert json.loads((tmp_path / "radii.json").read_text())["epoch"] == epochs
    assert len(checkpoint.existing(tmp_path / "checkpoints", "best")) == 1


def test_an_epoch_of_bad_steps_alone_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are no more than the bound: three batches are fewer than 20."""
    config = tiny(objective(tmp_path, monkeypatch, "bad", "loss * float('nan')"))
    with pytest.raises(train.TrainingError, match=r"epoch 1: .*not finite in 3 of 3 steps \(batches \[0, 1, 2\]"):
        train.run(config, tmp_path / "run", quiet=True)


def test_bad_batches_are_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = "loss * float('nan') if self.calls == 2 else loss"
    train.run(tiny(objective(tmp_path, monkeypatch, "second", second)), tmp_path / "run", quiet=True)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [(r["bad_steps"], r["bad_batches"]) for r in records] == [(1, [1]), (0, [])]


# stops --------------------------------------------------------------------------------------------------------
def test_a_stop_while_the_radii_are_written_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights, which are in the model by then, do not get into it; the same command writes the radii."""
    real, taken = train.Trainer._write_radii, []

    def stopped(self: train.Trainer) -> None:
        taken.append(checkpoint.existing(tmp_path / "checkpoints", "last")[0].read_bytes())
        signal.raise_signal(signal.SIGTERM)
        real(self)

    monkeypatch.setattr(train.Trainer, "_write_radii", stopped)
    with pytest.raises(Interrupted):
        train.run(tiny(), tmp_path, quiet=True)
    assert not (tmp_path / "radii.json").exists()
    assert checkpoint.existing(tmp_path / "checkpoints", "last")[0].read_bytes() == taken[0]
    monkeypatch.undo()
    train.run(tiny(), tmp_path, quiet=True)
    assert (tmp_path / "radii.json").exists()


def test_a_stop_after_the_last_look_ends_the_command_before_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train.Trainer._write_radii

    def stopped(self: train.Trainer) -> None:
        real(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.Trainer, "_write_radii", stopped)
    monkeypatch.setattr("mwpb_fast.evaluation.checkpoint.evaluate_run", None)
    words = [
        "train",
        "digits.mwpb_at",
        *TINY,
        "--optim.drops=[]",
        "--evaluation.attacks=natural",
        "--quiet",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(words) == 130
    assert capsys.readouterr().err == "mwpb-fast: stopped by SIGINT; the same command goes on from here\n"


MODEL = """
import torch
from mwpb_fast.models import smallresnet


class Drawing(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside, self.dropout = inside, torch.nn.Dropout(0.3)

    def forward(self, x):
        return self.inside(self.dropout(x) if self.training else x + 0.01 * torch.randn_like(x))


def build(width, *, num_classes, channels):
    return Drawing(smallresnet.build(width, num_classes=num_classes, channels=channels))
"""


@pytest.mark.parametrize(("cut", "at"), [(1, (1, 2)), (4, (1, 3)), (7, (1, 3)), (10, (1, 3)), (13, (2, 2))])
def test_what_draws_from_torchs_generator_goes_on_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, at: tuple[int, int]
) -> None:
    """A model of the user's with dropout, which draws in eval mode too, and an objective with noise of its own,
    stopped in the epochs' batches and in each pass of the validation."""
    noisy = objective(tmp_path, monkeypatch, "noisy", "loss * (1 + 0.1 * torch.randn(()))")
    (tmp_path / "noisy_outside" / "model.py").write_text(MODEL)
    config = tiny(noisy, "--data.subset=192", "--model.name=noisy_outside.model-4", "--evaluation.batch_size=50")
    train.run(config, tmp_path / "whole", quiet=True)
    trainer = train.Trainer(config, tmp_path / "cut", StopAfter(cut), quiet=True)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        trainer.train()
    stopped = final_state(tmp_path / "cut")
    torch.manual_seed(7)
    train.run(config, tmp_path / "cut", quiet=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert (stopped["epoch"], stopped["batch"]) == at


def test_a_checkpoint_without_the_generators_is_refused(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    path = checkpoint.existing(tmp_path / "checkpoints", "last")[0]
    state = checkpoint.read(path)
    del state["random"]
    checkpoint.save(path.parent, "last", state["epoch"], state["batch"], state)
    with pytest.raises(checkpoint.CheckpointError, match=r"of an earlier version.*--no-resume"):
        train.run(tiny("--epochs=2"), tmp_path, quiet=True)


# figures ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cut", [1, 4])
def test_figures_of_an_epoch_are_those_of_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Stopped after its second batch, or in its validation, an epoch takes no less time than its three batches."""
    step = train.Step.__call__

    def slow(self: Any, *words: Any) -> Any:
        time.sleep(0.3)
        return step(self, *words)

    monkeypatch.setattr(train.Step, "__call__", slow)
    config, before = tiny("--data.subset=192", "--epochs=1", "--warmup_epochs=0"), []
    trainer = train.Trainer(config, tmp_path, StopAfter(cut), quiet=True)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        trainer.train()
    monkeypatch.setattr(
        "mwpb_fast.train.progress", lambda *words, done, form: before.append(done) or progress(*words)
    )
    record = train.run(config, tmp_path, quiet=True)
    assert 0.9 <= record["seconds"] < 30
    assert record["images_per_second"] == pytest.approx(192 / record["seconds"])
    assert 0 < record["wait_share"] < 1
    assert before == [64 * {1: 2, 4: 3}[cut]]


def test_a_smaller_last_batch_counts_as_what_it_is(tmp_path: Path) -> None:
    config = tiny("--data.subset=150", "--data.last_batch=keep", "--epochs=1", "--warmup_epochs=0")
    record = train.run(config, tmp_path, quiet=True)
    assert record["images_per_second"] * record["seconds"] == pytest.approx(150)


def test_progress_counts_from_where_the_work_stood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    with progress(100, "epoch", every=0.0, done=90) as bar:
        time.sleep(0.1)
        bar.advance(1)
        assert bar.rate < 11
    assert capsys.readouterr().err.startswith("epoch: 91/100, ")
