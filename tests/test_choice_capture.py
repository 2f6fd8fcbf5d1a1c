"""Faults injected into captures, at the start of a run and in a later phase, and what proves a captured step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from choice_cases import MEMORY, begun, clock, config, graphs, record, refusals, tried
from fake_recorder import FakeRecorder

from mwpb_fast import capture, train
from mwpb_fast.capture import CapturedStep
from mwpb_fast.choice import proof
from mwpb_fast.engine.twin import TwinNet

FIXTURES = (graphs, tried)
pytestmark = pytest.mark.usefixtures("tried")


class Faulty(FakeRecorder):
    """captures: how many are right before one fails."""

    error: Exception = MEMORY
    captures = 0

    def capture(self, function: Callable[[], object]) -> None:
        if Faulty.captures <= 0:
            raise Faulty.error
        Faulty.captures -= 1
        super().capture(function)


def faulty(monkeypatch: pytest.MonkeyPatch, captures: int, error: Exception = MEMORY) -> None:
    monkeypatch.setattr(Faulty, "captures", captures)
    monkeypatch.setattr(Faulty, "error", error)
    monkeypatch.setattr(capture, "CapturedStep", lambda *a: CapturedStep(*a, make_recorder=Faulty))


@pytest.mark.parametrize("error", [MEMORY, KeyError("x")])
def test_a_capture_that_fails_at_the_start(
    tmp_path: Path, graphs: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    faulty(monkeypatch, 0, error)
    trainer = begun(tmp_path)
    assert trainer.engine.captured is None
    assert isinstance(trainer.step.net, TwinNet)
    found = refusals(tmp_path)
    assert found["twin fp32, captured"] == found["eager fp32, captured"] == str(error).splitlines()[0]
    assert found["twin fp32"] == found["eager fp32"] == ""


def test_a_capture_that_fails_later(
    tmp_path: Path, graphs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two in the trial and one in the first phase are right; in the second phase the memory does not suffice."""
    clock(monkeypatch, lambda work: getattr(work, "__name__", "") != "_eager")
    faulty(monkeypatch, 3)
    train.run(config(), tmp_path / "tried", quiet=True)
    told = record(tmp_path / "tried")
    assert [f["epoch"] for f in told["fallbacks"]] == [2, 2]
    assert {f["why"] for f in told["fallbacks"]} == {
        "cannot be captured: CUDA out of memory. Tried to allocate 2 GiB."
    }
    assert [f["to"] for f in told["fallbacks"]] == ["eager fp32, captured", "twin fp32"]
    assert told["chosen"]["name"] == "twin fp32"
    assert "; twin fp32 goes on" in capsys.readouterr().err


def test_a_replay_that_differs(tmp_path: Path, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, lambda work: getattr(work, "__name__", "") != "_eager")

    class Wrong(FakeRecorder):
        def replay(self) -> None:
            super().replay()
            assert self.log is not None
            for t in self.log.calls[-1][1]:
                if isinstance(t, torch.Tensor) and t.is_floating_point():
                    t.mul_(1.5)

    monkeypatch.setattr(capture, "CapturedStep", lambda *a: CapturedStep(*a, make_recorder=Wrong))
    trainer = begun(tmp_path)
    assert trainer.engine.captured is None
    assert "a replay differs from the eager step in" in refusals(tmp_path)["twin fp32, captured"]


class Outcomes:
    """A captured step with the outcomes that a test wants."""

    def __init__(self, *values: float, count: int = 0) -> None:
        self.found = [{"model.w": torch.tensor([v, 1.0]), "model.n": torch.tensor(count)} for v in values]

    def outcomes(self, *arguments: Any, eager: int) -> list[dict[str, torch.Tensor]]:
        assert eager == 2
        return self.found


def test_bits_where_eager_repeats_them_and_bounds_where_it_does_not() -> None:
    def wrong(*values: float) -> str:
        return proof.flaw(Outcomes(*values))  # type: ignore[arg-type]

    assert wrong(1.0, 1.0, 1.0) == ""
    assert wrong(1.0, 1.0, 1.000001) == "a replay differs from the eager step in model.w and 0 more"
    assert wrong(1.0, 1.001, 1.002) == ""
    assert wrong(1.0, 1.001, 1.02) != ""
    assert wrong(1.0, 2.0, 1.5) != ""  # what is not even near itself proves nothing
    assert wrong(1.0, 1.001, float("nan")) != ""


def test_memory_that_a_recording_holds_is_freed_for_what_else_is_to_be_done(
    tmp_path: Path, graphs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock(monkeypatch, lambda work: getattr(work, "__name__", "") != "_eager")
    trainer = begun(tmp_path)
    engine, key = trainer.engine, trainer._key(1)
    engine.begin(1, 0, key)
    before = FakeRecorder.alive

    def needs_room() -> int:
        if FakeRecorder.alive == before:
            raise MEMORY
        return 3

    assert engine.with_room(needs_room) == 3
    assert "what was recorded is freed, and recorded anew" in capsys.readouterr().err
    engine.begin(1, len(trainer.loader), key)  # as a run goes on that was stopped after an epoch's last batch
    assert not engine.record.fallbacks
    assert FakeRecorder.alive == before - 1
    engine.begin(1, 1, key)
    assert FakeRecorder.alive == before
    engine.close()
    trainer.engine.captured = None
    with pytest.raises(torch.OutOfMemoryError):
        engine.with_room(lambda: (_ for _ in ()).throw(MEMORY))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_a_trial_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Every candidate is proven there; and what is chosen trains as it does when it is named."""
    options = ("--precision.device=cuda", f"--precision.dtype={dtype}")
    train.run(config(*options), tmp_path, quiet=True)
    told = record(tmp_path)
    assert told["how"] == "trial"
    assert not told["fallbacks"]
    assert refusals(tmp_path)[f"twin {'bf16' if dtype == 'auto' else dtype}, captured"] == ""
