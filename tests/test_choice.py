"""The engine that a run chooses for itself: what is compared, what is taken, and what is left of the trial."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import AT, assert_same, batch, make_step, values
from choice_cases import begun, clock, config, failing, graphs, of_eager, record, state, tried
from test_train import StopAfter, final_state
from twin_cases import needs_bf16

from mwpb_fast import capture, train
from mwpb_fast.choice import cache, candidates, trial
from mwpb_fast.choice.candidates import DTYPES, Candidate
from mwpb_fast.choice.record import Tried, fastest
from mwpb_fast.choice.untouched import untouched
from mwpb_fast.config import ConfigError, PrecisionConfig
from mwpb_fast.engine import precision
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.system.signals import Interrupted

FIXTURES = (graphs, tried)


# what is compared ---------------------------------------------------------------------------------------------
def names(precision: Precision, *options: str) -> tuple[list[str], list[str]]:
    first, last = candidates.candidates(config(*options), precision)
    return [str(c) for c in first], [str(c) for c in last]


def on(device: str, dtype: torch.dtype = torch.float32) -> Precision:
    return Precision(torch.device(device), dtype, torch.channels_last, oracle=False)


def test_candidates_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "cpu_has_bf16", lambda: True)
    assert names(on("cpu")) == (["twin fp32", "twin bf16", "eager fp32"], [])
    # what the user has named is kept
    for named in ("--precision.dtype=fp32", "--precision.attack_dtype=fp32"):
        assert names(on("cpu"), named) == (["twin fp32", "eager fp32"], [])
    assert names(on("cpu"), "--precision.engine=twin") == (["twin fp32"], [])
    assert names(on("cpu"), "--precision.oracle=true") == (["eager fp32"], [])
    assert names(on("cpu"), "--attack_mode=train") == (["eager fp32"], [])
    monkeypatch.setattr(candidates, "cpu_has_bf16", lambda: False)
    assert names(on("cpu")) == (["twin fp32", "eager fp32"], [])


def test_candidates_on_cuda() -> None:
    cuda = on("cuda", torch.bfloat16)
    first, last = names(cuda)
    nets = ["by_hand bf16", "twin bf16", "eager bf16"]
    graphed = [f"{net}, captured" for net in ("by_hand bf16", "halves bf16", *nets[1:])]
    assert first == [*graphed, *nets]
    assert last == [name.replace("bf16", "fp32") for name in first]
    assert names(cuda, "--precision.dtype=bf16") == (first, [])
    assert names(cuda, "--precision.engine=halves") == (["halves bf16, captured", "halves bf16"], [])
    assert names(cuda, "--precision.engine=twin") == (["twin bf16, captured", "twin bf16"], [])
    assert names(cuda, "--precision.capture=true")[0] == graphed
    assert names(cuda, "--precision.capture=false")[0] == nets
    tuned = names(cuda, "--precision.tune=true", "--precision.capture=false")[0]
    assert tuned == ["by_hand bf16", "twin bf16, tuned", "eager bf16"]


def test_what_is_not_clearly_faster_is_not_taken() -> None:
    def times(*milliseconds: float) -> str:
        tried = [Tried(Candidate("twin", d), {}, m) for d, m in zip(DTYPES, milliseconds, strict=False)]
        best = fastest(tried)
        assert best is not None
        return best.candidate.dtype

    assert times(1.0, 0.95, 0.91) == "fp32"
    assert times(1.0, 0.6, 0.85) == "bf16"
    assert times(1.0, 0.82, 0.8) == "bf16"
    assert fastest([Tried(Candidate("twin", "fp32"), {}, 1.0, "no")]) is None


def test_the_clock_of_a_trial() -> None:
    calls: list[int] = []
    assert trial.seconds(lambda: calls.append(1), 3, torch.device("cpu")) > 0
    assert len(calls) == 3
    for by_the_clock in (True, False):
        assert 0 <= trial.Spent(by_the_clock).seconds < 100


# what is left of it -------------------------------------------------------------------------------------------
def test_steps_that_leave_no_trace() -> None:
    step = make_step(ema=0.9)
    step(*batch(0), AT)
    step.optimizer.zero_grad(set_to_none=True)
    before, generators = values(step), (torch.get_rng_state(), random.getstate())
    optimiser, assumed = step.optimizer.state_dict(), step.average.steps if step.average else 0
    modes = [module.training for module in step.model.modules()]
    with untouched(step, AT):
        step(*batch(1), AT)
        step.model.eval()
        torch.rand(3)
        random.random()
        step.optimizer.state[step.parameters[0]]["later"] = torch.ones(3)
    assert_same(values(step), before)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert step.optimizer.state_dict()["state"].keys() == optimiser["state"].keys()
    assert "later" not in step.optimizer.state[step.parameters[0]]
    assert not hasattr(step.optimizer, "found_inf")
    assert step.average is not None
    assert step.average.steps == assumed
    assert all(p.grad is None for p in step.parameters)
    assert [module.training for module in step.model.modules()] == modes


@pytest.mark.usefixtures("tried")
def test_a_chosen_engine_is_the_named_one_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, of_eager)
    for name, options in {"chosen": (), "named": ("--precision.engine=eager",)}.items():
        train.run(config("--optim.ema=0.9", *options), tmp_path / name, quiet=True)
    assert_same_state(tmp_path / "chosen", tmp_path / "named")
    told = record(tmp_path / "chosen")
    assert (told["chosen"]["name"], told["how"]) == ("eager fp32", "trial")
    assert [t["milliseconds"] for t in told["tried"]] == pytest.approx([100, 50])
    assert told["tried"][1]["ledger"]["loss_ratio"] == pytest.approx(1)
    assert record(tmp_path / "named")["how"] == "option"


@needs_bf16
@pytest.mark.usefixtures("tried")
def test_a_cpu_may_attack_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "cpu_has_bf16", lambda: True)
    clock(monkeypatch, lambda work: getattr(work.args[0], "dtype", None) == torch.bfloat16)
    train.run(config("--epochs=1"), tmp_path / "chosen", quiet=True)
    options = ("--precision.engine=twin", "--precision.attack_dtype=bf16")
    train.run(config("--epochs=1", *options), tmp_path / "named", quiet=True)
    assert_same_state(tmp_path / "chosen", tmp_path / "named")
    assert record(tmp_path / "chosen")["chosen"]["name"] == "twin bf16"


@pytest.mark.usefixtures("tried")
def test_a_captured_step_is_chosen_where_it_is_right_and_fast(
    tmp_path: Path, graphs: list[capture.CapturedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, lambda work: getattr(work, "__name__", "") != "_eager")
    train.run(config(), tmp_path / "chosen", quiet=True)
    told = record(tmp_path / "chosen")
    assert told["chosen"]["name"] == "twin fp32, captured"
    assert told["timed"] == trial.STEP
    assert not told["fallbacks"]
    train.run(config("--precision.engine=twin", "--precision.capture=true"), tmp_path / "named", quiet=True)
    assert_same_state(tmp_path / "chosen", tmp_path / "named")


def assert_same_state(one: Path, other: Path) -> None:
    same(state(one), state(other))


def same(one: Any, other: Any) -> None:
    from test_train import assert_same as equal

    equal(one, other)


# going on, again and elsewhere --------------------------------------------------------------------------------
@pytest.mark.usefixtures("tried")
def test_a_run_goes_on_with_its_choice_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, of_eager)
    train.run(config(), tmp_path / "whole", quiet=True)
    stop: Any = StopAfter(1)
    with pytest.raises(Interrupted):
        train.Trainer(config(), tmp_path / "cut", stop, quiet=True).train()
    told = record(tmp_path / "cut")
    monkeypatch.setattr(trial.Trial, "run", failing(AssertionError("a trial")))
    monkeypatch.setattr(cache, "read", failing(AssertionError("the cache")))
    train.run(config(), tmp_path / "cut", quiet=True)
    same(state(tmp_path / "whole"), state(tmp_path / "cut"))
    assert record(tmp_path / "cut") == told
    assert final_state(tmp_path / "cut")["engine"]["chosen"]["net"] == "eager"


@pytest.mark.usefixtures("tried")
def test_a_run_without_a_record_goes_on_by_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was begun before there were trials, or that was too short for one."""
    monkeypatch.setattr(train, "choose", lambda engine, *rest: engine.write())
    train.run(config("--epochs=1"), tmp_path, quiet=True)
    monkeypatch.setattr(trial.Trial, "run", failing(AssertionError("a trial")))
    train.run(config("--epochs=2"), tmp_path, quiet=True)
    assert record(tmp_path)["chosen"]["name"] == "twin fp32"
    assert final_state(tmp_path)["engine"] == {}


@pytest.mark.usefixtures("tried")
def test_the_second_start_takes_the_first_ones_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock(monkeypatch, of_eager)

    def started(name: str, *options: str) -> dict[str, Any]:
        trainer = train.Trainer(config(*options), tmp_path / name, StopAfter(9))  # type: ignore[arg-type]
        trainer._claim_folder()
        return record(tmp_path / name)

    assert started("a")["how"] == "trial"
    monkeypatch.setattr(trial, "seconds", failing(AssertionError("measured")))
    again = started("b")
    assert (again["how"], again["chosen"]["net"]) == ("cache", "eager")
    assert "engine: eager fp32: as an earlier start found" in capsys.readouterr().out
    assert started("c", "--data.batch_size=16")["tried"][0]["refused"] == "measured"
    (path, *more) = sorted(cache.folder().glob("*.json"))
    assert not more
    for damage in (b"{", b"[]", path.read_bytes().replace(b'"AT"', b'"BT"').replace(b"engine", b"motor")):
        path.write_bytes(damage)
        assert started("d")["how"] == "rule"
        assert "is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("tried")
def test_a_pin_repeats_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, of_eager)
    train.run(config("--epochs=1"), tmp_path / "one", quiet=True)
    monkeypatch.setattr(trial.Trial, "run", failing(AssertionError("a trial")))
    pin = f"--precision.pin={tmp_path / 'one' / 'engine.json'}"
    train.run(config("--epochs=1", pin), tmp_path / "other", quiet=True)
    assert_same_state(tmp_path / "one", tmp_path / "other")
    told = record(tmp_path / "other")
    assert (told["how"], told["chosen"]["name"]) == ("pin", "eager fp32")
    # also of a run that chose nothing
    pin = f"--precision.pin={tmp_path / 'other' / 'engine.json'}"
    train.run(config("--epochs=1", pin), tmp_path / "third", quiet=True)
    assert_same_state(tmp_path / "one", tmp_path / "third")


def test_pins_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine.json"
    trainer = lambda: train.Trainer(config(f"--precision.pin={path}"), tmp_path, StopAfter(9))  # type: ignore[arg-type]  # noqa: E731
    with pytest.raises(ConfigError, match=r"^precision.pin: .*engine.json: No such file"):
        trainer()
    for content, reason in {
        "{": "not an engine.json",
        "[1]": "says nothing of an engine",
        '{"chosen": {"net": "warp", "dtype": "fp32"}}': "no engine warp fp32; there are by_hand, halves, twin",
        '{"chosen": {"net": "twin", "dtype": "fp32"}, "tried": [1]}': "a choice is an object",
    }.items():
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=reason):
            trainer()
    path.write_text('{"chosen": {"net": "twin", "dtype": "bf16"}}', encoding="utf-8")
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)  # it would be emulated
    with pytest.raises(ConfigError, match=r"^precision.pin: twin bf16: .*bf16 needs a CPU with"):
        trainer()
    path.write_text('{"chosen": {"net": "twin", "dtype": "fp32", "captured": true}}', encoding="utf-8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"^precision.pin: twin fp32, captured: .* need a CUDA device"):
            trainer()
    for other in ({"engine": "twin"}, {"capture": True}, {"oracle": True}):
        with pytest.raises(ValueError, match="leave engine and capture at auto"):
            PrecisionConfig(pin="x", **other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "why"), [((), "too short for a trial, with 4 steps"), (("--epochs=9999999",), "too small a model")]
)
def test_a_run_that_is_not_worth_a_trial_takes_what_the_rule_prefers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], why: str
) -> None:
    monkeypatch.setattr(trial.Trial, "run", failing(AssertionError("a trial")))
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path / "cache"))
    trainer = begun(tmp_path, *options)
    assert type(trainer.step.net) is TwinNet
    told = record(tmp_path)
    assert told["how"] == "rule"
    assert told["why"].startswith(f"by rule: {why}")
    assert not (tmp_path / "cache").exists()
