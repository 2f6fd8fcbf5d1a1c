"""What a trial costs: fewer readings where it is plain what is faster; and a bound in gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capture_cases import AT, batch, make_step
from choice_cases import begun, clock, of_eager, record, tried
from twin_cases import CPU32

from mwpb_fast.choice import cache, candidates, start, trial
from mwpb_fast.choice.candidates import Candidate
from mwpb_fast.choice.ledger import Ledger
from mwpb_fast.choice.record import Record, Tried, fastest, read_record
from mwpb_fast.engine import build
from mwpb_fast.engine import tune as tuning
from mwpb_fast.engine.layers import FUSED, PLAIN, FoldedConv
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.processor import cpu_has_bf16
from mwpb_fast.engine.twin import TwinNet

FIXTURES = (tried,)
GRADIENTS = 80  # as docs/usage.md has it
TWIN, EAGER = Candidate("twin", "fp32"), Candidate("eager", "fp32")


def readings(times: dict[Candidate, list[float]], monkeypatch: pytest.MonkeyPatch) -> tuple[Tried, dict[str, int]]:
    """What a trial takes whose candidates' gradients take so many seconds, one after another; how often each was
    looked at."""
    step = make_step()
    nets = {TWIN: step.net, EAGER: EagerNet(step.model, CPU32)}
    seen = {str(c): 0 for c in times}

    def seconds(work: Any, count: int, device: torch.device) -> float:
        candidate = next(c for c, net in nets.items() if net is work.args[0])
        seen[str(candidate)] += 1
        return times[candidate][seen[str(candidate)] - 1]

    monkeypatch.setattr(trial, "seconds", seconds)
    given, key = batch(0)
    ledger = Ledger(step.model, CPU32, given, 8 / 255, "eval")
    inputs = trial.Inputs(given, key, AT)
    made = trial.Trial(step, inputs, nets.__getitem__, lambda: None, ledger, 1e9)  # type: ignore[arg-type, return-value]
    _, best, _ = made.run([TWIN, EAGER], [])
    assert best is not None
    return best, seen


def test_what_is_plainly_slower_is_not_timed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [0.3, 0.2, *[9.0] * 9]
    best, seen = readings({TWIN: slow, EAGER: [0.1] * 9}, monkeypatch)
    assert best.candidate == EAGER
    assert seen == {"twin fp32": trial.SURE, "eager fp32": trial.ROUNDS}


def test_a_burst_of_a_neighbour_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was slow once is looked at again, and what is not much slower to the end."""
    best, seen = readings({TWIN: [0.9, 0.14, 0.14, 0.1, 0.1], EAGER: [0.1] * 5}, monkeypatch)
    assert best.candidate == TWIN
    assert set(seen.values()) == {trial.ROUNDS}
    found = Tried(TWIN, {}, 99.0)
    assert not trial.hopeless(Tried(TWIN), [found])
    assert not trial.hopeless(found, [found, Tried(EAGER, {}, 1.0, "it failed")])


def test_steps_of_a_slow_one_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def seconds(work: Any, count: int, device: torch.device) -> float:
        counts.append(count)
        return 0.03 * count

    monkeypatch.setattr(trial, "seconds", seconds)
    one = trial.Trial(make_step(), None, None, None, None, 1e9)  # type: ignore[arg-type]
    for least in (float("inf"), 25.0, 15.0):
        one._least = least
        assert one._time_steps(lambda: None) == pytest.approx(30)
    assert counts == [1, trial.STEPS, 1, trial.STEPS, 1, trial.SURE]


def test_the_margin_of_whole_steps_is_narrower() -> None:
    tried = [Tried(TWIN, {}, 10.0), Tried(EAGER, {}, 9.3)]
    for margin, taken in ((0.9, TWIN), (trial.STEPS_MARGIN, EAGER)):
        best = fastest(tried, margin)
        assert best is not None
        assert best.candidate == taken


@pytest.mark.usefixtures("tried")
def test_its_work_is_bounded_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In gradients of the images that are looked at, where everything is looked at to the end and fails there;
    logits alone count as half of one."""
    work = [0.0]

    def counted(kind: Any, name: str, each: float) -> None:
        whole = getattr(kind, name)

        def call(self: Any, x: torch.Tensor, *more: Any) -> torch.Tensor:
            work[0] += each * len(x)
            result: torch.Tensor = whole(self, x, *more)
            return result

        monkeypatch.setattr(kind, name, call)

    trainer = begun(tmp_path)
    images = record(tmp_path)["tried"][0]["ledger"]["images"]
    for kind in (EagerNet, TwinNet):
        counted(kind, "input_grad", 1)
        counted(kind, "logits", 0.5)
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path / "other"))
    trainer.engine.record.how = "rule"
    monkeypatch.setattr(candidates, "cpu_has_bf16", cpu_has_bf16)
    monkeypatch.setattr(trial, "breach", lambda row: "wrong" if "images" in row else "")
    start.choose(trainer.engine, 1, trainer._key(1), quiet=True)
    assert {t.refused for t in trainer.engine.record.tried} == {"wrong"}
    assert 40 * images < work[0] <= GRADIENTS * images


@pytest.mark.usefixtures("tried")
def test_the_share_of_the_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fake clock: a gradient of 8 images takes 0.05 s, so a step of 32 takes 2.4 s, of which there are 4."""
    clock(monkeypatch, of_eager)
    now = iter([100.0, 101.439])
    monkeypatch.setattr(start, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(trial.Spent, "__init__", lambda self, by_the_clock: None)
    monkeypatch.setattr(trial.Spent, "seconds", 0.0)
    trainer = begun(tmp_path)
    steps = trainer.engine.config.epochs * len(trainer.loader)
    told = record(tmp_path)
    assert told["seconds"] == pytest.approx(1.439)
    assert told["share"] == pytest.approx(1.439 / (steps * 2.4))
    assert "in 1.4 s, at most 14.99% of the run" in told["why"]
    old = {k: v for k, v in told.items() if k != "share"}  # as an earlier version wrote it
    assert read_record(old).share == 0
    assert start._expected(trainer.engine, Tried(TWIN), None) == float("inf")
    assert "of the run" not in start._why(Tried(TWIN), [], 1.0, 0.0)
    assert isinstance(trainer.engine.record, Record)


@pytest.mark.usefixtures("tried")
def test_without_graphs_the_layers_of_the_one_that_is_taken_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, within the trial; they are held to the ledger, and the next start has them without a measurement."""
    calls: list[TwinNet] = []

    def tune(net: TwinNet, sample: torch.Tensor, **more: Any) -> list[dict[str, Any]]:
        calls.append(net)
        return [{"layer": la.name, "chosen": "fused"} for la in net.layers if isinstance(la, FoldedConv)]

    monkeypatch.setattr(build, "tune", tune)
    monkeypatch.setattr(start, "TUNED", 1e9)
    options = ("--precision.tune=true", "--data.batch_size=16")
    trainer = begun(tmp_path / "one", *options)
    assert calls == [trainer.step.net]
    told = record(tmp_path / "one")
    assert (told["chosen"]["name"], told["how"]) == ("twin fp32, tuned", "trial")
    assert told["layers"][0]["chosen"] == "fused"
    assert "best of 2 that passed of 2, in " in told["why"]
    again = begun(tmp_path / "two", *options)
    assert len(calls) == 1
    assert again.engine.record.how == "cache"
    assert record(tmp_path / "two")["layers"] == told["layers"]
    share = Ledger.share
    wrong = lambda self, net: 0.9 if net in calls else share(self, net)  # noqa: E731
    monkeypatch.setattr(Ledger, "share", wrong)
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path / "other"))
    assert begun(tmp_path / "three", *options).engine.record.chosen == EAGER
    assert not cache.folder().exists()


@pytest.mark.parametrize(
    ("plain", "fused", "readings"),
    [
        (1.0, 1.0, {PLAIN: 10, FUSED: 10}),  # as many as are asked for
        (50.0, 60.0, {PLAIN: 3, FUSED: 3}),  # a slow layer is read less often
        (1.0, 1.6, {PLAIN: 10, FUSED: 2}),  # what is far behind is not read to the end
        (150.0, 500.0, {PLAIN: 3, FUSED: 2}),
    ],
)
def test_how_often_a_layer_is_read(
    plain: float, fused: float, readings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a fake clock, so that tuning does not outlast the budget of a run's start on a slow processor."""
    times, seen = {PLAIN: plain, FUSED: fused}, {PLAIN: 0, FUSED: 0}

    def milliseconds(work: Any, device: torch.device) -> float:
        seen[work] += 1
        return times[work]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    runs: Any = {name: name for name in times}
    assert tuning._measure(runs, torch.device("cpu"), 10, captured=False) == (times, "")
    assert seen == readings
