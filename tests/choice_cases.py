"""Trials of engines for tests: in tiny runs, with a clock that says what the test wants."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_recorder import FakeRecorder
from test_train import StopAfter, final_state, tiny

from mwpb_fast import capture, train
from mwpb_fast.choice import candidates, ledger, start, trial
from mwpb_fast.config import Config
from mwpb_fast.engine.net import EagerNet

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
CPU_RUN = ("--precision.device=cpu", "--data.subset=64", "--data.batch_size=32", "--data.validation=0")


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is worth a trial, the processor has float32 alone, nothing is faster than anything else, however
    slow the machine is, and nothing is remembered of other tests."""
    clock(monkeypatch, lambda work: False)
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(start, "WORTH", 0)
    monkeypatch.setattr(start, "LIMIT", 1e9)
    monkeypatch.setitem(start.SMALL, "cpu", 0.0)
    monkeypatch.setitem(ledger.MOST, "cpu", 8)
    monkeypatch.setattr(candidates, "cpu_has_bf16", lambda: False)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[capture.CapturedStep]:
    """The CPU has graphs, of the fake recorder; the captured steps that are made."""
    made: list[capture.CapturedStep] = []

    def make(*arguments: Any) -> capture.CapturedStep:
        made.append(captured_step(*arguments))
        return made[-1]

    captured_step = functools.partial(capture.CapturedStep, make_recorder=FakeRecorder)
    monkeypatch.setattr(capture, "CapturedStep", make)
    for module in (candidates, start, trial):
        monkeypatch.setattr(module, "graphs", lambda device: True)
    return made


def clock(monkeypatch: pytest.MonkeyPatch, best: Callable[[Any], bool]) -> None:
    """What `best(work)` holds for takes half of the time of the others."""

    def seconds(work: Any, count: int, device: torch.device) -> float:
        work()
        return count * (0.05 if best(work) else 0.1)

    monkeypatch.setattr(trial, "seconds", seconds)


def of_eager(work: Any) -> bool:
    """Whether it is a gradient of the model itself."""
    return isinstance(work.args[0], EagerNet)


def config(*options: str) -> Config:
    return tiny(*CPU_RUN, *options)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    return found


def state(folder: Path) -> dict[str, Any]:
    """The last checkpoint, but for how the engine was asked for and chosen."""
    found = final_state(folder)
    for name in ("engine", "capture", "pin", "attack_dtype", "training"):
        found["config"]["precision"].pop(name)
    del found["engine"]
    return found


def failing(error: Exception) -> Callable[..., Any]:
    """A function that raises."""

    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    return fail


def begun(folder: Path, *options: str) -> train.Trainer:
    """A trainer whose engine is chosen."""
    trainer = train.Trainer(config(*options), folder, StopAfter(10**9), quiet=True)  # type: ignore[arg-type]
    trainer._claim_folder()
    return trainer


def refusals(folder: Path) -> dict[str, str]:
    return {t["name"]: t["refused"] for t in record(folder)["tried"]}
