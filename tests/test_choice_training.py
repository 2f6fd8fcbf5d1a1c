"""Training passes as candidates: judged by a ledger of their own, timed, refused in a line, had by name."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import batch, make_step
from choice_cases import MEMORY, begun, clock, config, failing, graphs, record, refusals, state, tried
from test_choice import on
from test_train import StopAfter, assert_same
from twin_cases import CPU32

from mwpb_fast import train
from mwpb_fast.choice import candidates, pass_ledger, start, trial
from mwpb_fast.choice.pass_ledger import PassLedger, breach
from mwpb_fast.config import ConfigError, PrecisionConfig
from mwpb_fast.engine import build, fused_pass
from mwpb_fast.engine.fused_pass import FusedPass
from mwpb_fast.system.signals import Interrupted

FIXTURES = (graphs, tried)
FUSED = "twin fp32, captured, fused training"


@pytest.fixture
def offered(tried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU tries the fused pass, too, however long that takes here."""
    monkeypatch.setattr(start, "LIMIT", 1e6)
    monkeypatch.setattr(candidates, "TRIED_TRAININGS", {"cpu": ("fused",)})


def takes(monkeypatch: pytest.MonkeyPatch, milliseconds: float) -> None:
    """So long takes a step with another training pass than the plain one, which takes 100 ms."""

    def time_steps(self: trial.Trial, step: Any) -> float:
        step()
        return 100.0 if self.step.trained is self.step.model else milliseconds

    monkeypatch.setattr(trial.Trial, "_time_steps", time_steps)


# what is offered ----------------------------------------------------------------------------------------------
def test_what_is_offered() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert candidates.trainings(config(), cpu) == ()
    assert candidates.trainings(config(), cuda) == ("fused",)
    assert candidates.trainings(config("--precision.tune=true"), cuda) == ("fused", "compiled")
    for named in ("--precision.training=plain", "--precision.compile=true", "--precision.oracle=true"):
        assert candidates.trainings(config(named), cuda) == ()
    first, _ = candidates.candidates(config("--precision.training=fused"), on("cuda", torch.bfloat16))
    assert {c.training for c in first} == {"fused"}
    for name in build.TRAININGS:
        assert PrecisionConfig(training=name).training == name
    for wrong in (
        {"training": "best"},
        {"compile": True, "training": "fused"},
        {"oracle": True, "training": "fused"},
    ):
        with pytest.raises(ValueError, match="training"):
            PrecisionConfig(**wrong)  # type: ignore[arg-type]


# a trial ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("offered", "graphs")
def test_the_faster_pass_is_taken_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit it trains as the one that is named, also where it goes on after a stop."""
    takes(monkeypatch, 97.0)
    stop: Any = StopAfter(1)
    with pytest.raises(Interrupted):
        train.Trainer(config(), tmp_path / "chosen", stop, quiet=True).train()
    monkeypatch.setattr(trial.Trial, "run", failing(AssertionError("a trial")))
    train.run(config(), tmp_path / "chosen", quiet=True)
    told = record(tmp_path / "chosen")
    assert told["chosen"]["name"] == FUSED
    assert not told["fallbacks"]
    ledger = next(t["ledger"] for t in told["tried"] if t["name"] == FUSED)
    assert ledger["time_of_plain"] == pytest.approx(0.97)
    assert 0 <= ledger["gradient"] < 1e-3
    named = ("--precision.engine=twin", "--precision.capture=true", "--precision.training=fused")
    train.run(config(*named), tmp_path / "named", quiet=True)
    assert_same(state(tmp_path / "chosen"), state(tmp_path / "named"))


@pytest.mark.usefixtures("offered", "graphs")
def test_one_that_is_not_clearly_faster_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    takes(monkeypatch, 99.0)
    trainer = begun(tmp_path)
    assert record(tmp_path)["chosen"]["name"] == "twin fp32, captured"
    assert refusals(tmp_path)[FUSED] == ""
    assert trainer.step.trained is trainer.model


@pytest.mark.usefixtures("offered")
def test_without_graphs_the_pass_alone_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, lambda work: isinstance(work.args[0], FusedPass))
    trainer = begun(tmp_path / "fast")
    assert record(tmp_path / "fast")["chosen"]["name"] == "twin fp32, fused training"
    assert isinstance(trainer.step.trained, FusedPass)
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path / "other"))
    clock(monkeypatch, lambda work: False)
    assert begun(tmp_path / "slow").engine.record.chosen.training == "plain"


@pytest.mark.usefixtures("offered", "graphs")
def test_the_next_start_has_it_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    takes(monkeypatch, 50.0)
    begun(tmp_path / "one")
    monkeypatch.setattr(trial.Trial, "run", failing(AssertionError("a trial")))
    trainer = begun(tmp_path / "two")
    assert (record(tmp_path / "two")["how"], str(trainer.engine.record.chosen)) == ("cache", FUSED)
    assert isinstance(trainer.step.trained, FusedPass)


# faults -------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("offered", "graphs")
@pytest.mark.parametrize("error", [MEMORY, RuntimeError("ptxas: too many registers\n..."), KeyError()])
def test_kernels_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    takes(monkeypatch, 50.0)
    monkeypatch.setattr(fused_pass, "norms", failing(error))
    trainer = begun(tmp_path)
    assert record(tmp_path)["chosen"]["name"] == "twin fp32, captured"
    assert (str(error).split("\n")[0] or "KeyError") in refusals(tmp_path)[FUSED]
    assert trainer.step.trained is trainer.model


@pytest.mark.usefixtures("offered", "graphs")
def test_a_compiler_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    takes(monkeypatch, 50.0)
    monkeypatch.setattr(candidates, "TRIED_TRAININGS", {"cpu": ("compiled", "fused")})
    monkeypatch.setattr(torch, "compile", failing(RuntimeError("no C++ compiler\nmore")))
    begun(tmp_path)
    assert record(tmp_path)["chosen"]["name"] == FUSED
    assert "twin fp32, captured, compiled training: precision.compile: torch.compile" in capsys.readouterr().err


@pytest.mark.usefixtures("offered", "graphs")
def test_a_pass_out_of_bounds_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    takes(monkeypatch, 50.0)
    norms = fused_pass.norms  # whose running statistics no comparison of logits and gradients looks at

    def wrong(*arguments: Any) -> Any:
        out, *others = norms(*arguments)
        return out, *others[:4], others[4] * 1.1

    monkeypatch.setattr(fused_pass, "norms", wrong)
    begun(tmp_path)
    assert record(tmp_path)["chosen"]["name"] == "twin fp32, captured"
    assert "statistics of the training pass 0.0" in refusals(tmp_path)[FUSED]


@pytest.mark.usefixtures("offered", "graphs")
@pytest.mark.parametrize("fault", ["out of bounds", "out of memory"])
def test_a_fault_in_a_later_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """The plain pass goes on, with the same net, captured as before."""
    takes(monkeypatch, 50.0)
    trainer = begun(tmp_path)
    row = PassLedger.row
    bad = failing(MEMORY) if fault == "out of memory" else lambda *a: row(*a) | {"gradient": 0.5}
    monkeypatch.setattr(PassLedger, "row", bad)
    trainer.engine.begin(6, 0, trainer._key(6))
    assert str(trainer.engine.record.chosen) == "twin fp32, captured"
    assert trainer.step.trained is trainer.model
    (fallen,) = record(tmp_path)["fallbacks"]
    assert (fallen["epoch"], fallen["from"]) == (6, FUSED)
    said = capsys.readouterr().err
    assert ("CUDA out of memory" if fault == "out of memory" else "gradient of the training pass 0.5 off") in said


@pytest.mark.usefixtures("offered")
def test_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.Trial, "_late", property(lambda self: True))
    begun(tmp_path)
    assert refusals(tmp_path)["twin fp32, fused training"] == trial.LATE


# by name, pinned, and of earlier versions ---------------------------------------------------------------------
def test_a_named_pass_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = begun(tmp_path / "fused", "--precision.training=fused")
    assert isinstance(trainer.step.trained, FusedPass)
    assert record(tmp_path / "fused")["chosen"]["name"] == "twin fp32, fused training"
    pin = f"--precision.pin={tmp_path / 'fused' / 'engine.json'}"
    assert isinstance(begun(tmp_path / "pinned", pin).step.trained, FusedPass)
    assert begun(tmp_path / "both", pin, "--precision.training=plain").engine.record.chosen.training == "plain"
    monkeypatch.setitem(build.TRAININGS, "fused", lambda model, x: FusedPass(torch.nn.Identity(), x))
    with pytest.raises(ConfigError, match=r"^precision.training: fused: it has no batch norm .*; take plain$"):
        begun(tmp_path / "other", "--precision.training=fused")


def test_records_that_name_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a version that had none: the plain one, but where the options ask for another, as a run then had it."""
    path, chosen = tmp_path / "engine.json", {"net": "twin", "dtype": "fp32"}
    path.write_text(json.dumps({"chosen": chosen}), encoding="utf-8")
    trainer = begun(tmp_path / "run", "--precision.training=fused")
    trainer.engine.load({"engine": {"chosen": chosen, "how": "trial"}})
    assert isinstance(trainer.step.trained, FusedPass)
    assert begun(tmp_path / "pinned", f"--precision.pin={path}").engine.record.chosen.training == "plain"
    path.write_text(json.dumps({"chosen": chosen | {"training": "best"}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="there is no training pass best; there are plain, fused, compiled"):
        begun(tmp_path / "wrong", f"--precision.pin={path}")


# the ledger ---------------------------------------------------------------------------------------------------
def test_the_ledger_of_a_pass() -> None:
    """The plain pass in float32 is the reference; what is wrong is far from it; and nothing is left of a look."""
    model = make_step().model
    before = copy.deepcopy(model.state_dict())
    ledger = PassLedger(model, CPU32, batch(0)[0])
    row = ledger.row(model)
    assert row == dict.fromkeys(row, 0.0)
    assert breach(ledger.row(FusedPass(model, batch(0)[0].x))) == ""

    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = model(x)
            return 1.1 * result

    assert breach(ledger.row(Scaled())).startswith("loss of the training pass ")
    for part in pass_ledger.PARTS:
        assert breach(row | {part: float("nan")}).startswith(part)
        assert breach(row | {part: 0.2, f"{part}_of_plain": 0.15}) == ""
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_low_precision_is_held_to_full_float32() -> None:
    model = make_step().model
    low = dataclasses.replace(CPU32, dtype=torch.bfloat16)
    ledger = PassLedger(model, low, batch(0)[0])
    row = ledger.row(FusedPass(model, batch(0)[0].x))
    assert 1e-3 < row["gradient_of_plain"] < 0.2  # bfloat16's own roundings
    assert breach(row) == ""
