"""How runs end: the last model where nothing is held out, steps that are all bad, stops near the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_train import final_state, tiny

from mwpb_fast import checkpoint, train
from mwpb_fast.log import read_records

OBJECTIVE = """
from dataclasses import dataclass

import torch
from mwpb_fast.attacks.inner import cross_entropy


@dataclass(frozen=True, kw_only=True)
class Config:
    def build(self):
        return Outside()


class Outside:
    uses_clean = False
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
