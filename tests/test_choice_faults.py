"""Faults injected into trials, and later: each is named in a line, the next best goes on, no run dies of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import batch, make_step
from choice_cases import MEMORY, begun, clock, config, failing, of_eager, record, refusals, state, tried
from test_train import assert_same
from twin_cases import CPU32

from mwpb_fast import train
from mwpb_fast.choice import cache, candidates, engine, start, trial
from mwpb_fast.choice.ledger import Ledger, breach
from mwpb_fast.engine import build
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.twin import TwinNet

FIXTURES = (tried,)
pytestmark = pytest.mark.usefixtures("tried")


# at the start -------------------------------------------------------------------------------------------------
def test_a_net_out_of_bounds_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    share = Ledger.share
    monkeypatch.setattr(Ledger, "share", lambda self, net: 0.98 if isinstance(net, TwinNet) else share(self, net))
    assert isinstance(begun(tmp_path).step.net, EagerNet)
    assert refusals(tmp_path) == {"twin fp32": "mass agreeing 0.9800, less than 0.995", "eager fp32": ""}
    assert "engine: twin fp32: mass agreeing 0.9800, less than 0.995\n" in capsys.readouterr().err


def test_the_fastest_is_only_taken_with_its_whole_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signs agree, yet what it finds in ten steps does not: the one that was less fast is taken."""
    clock(monkeypatch, of_eager)
    row = Ledger.row
    broken = {"mass_agreeing": 1.0, "loss_ratio": 0.9, "logits_apart": 0.0}
    monkeypatch.setattr(Ledger, "row", lambda self, net: broken if isinstance(net, EagerNet) else row(self, net))
    assert isinstance(begun(tmp_path).step.net, TwinNet)
    assert refusals(tmp_path)["eager fp32"] == "loss ratio 0.9000, less than 0.99"


def test_what_is_no_number_is_out_of_bounds() -> None:
    good = {"mass_agreeing": 1.0, "loss_ratio": 1.0, "logits_apart": 0.0}
    assert breach(good) == ""
    for name in good:
        assert breach(good | {name: float("nan")}).startswith(name.replace("_", " ").split()[0])
    assert breach(good | {"logits_apart": 0.2}) == "logits 0.200 of their norm apart, more than 0.1"


def tried_too(monkeypatch: pytest.MonkeyPatch, nets: dict[str, Any]) -> None:
    """These are the nets, and "fused" is what a trial here looks at first."""
    for module in (build, candidates):
        monkeypatch.setattr(module, "NETS", nets)
    monkeypatch.setattr(candidates, "TRIED", {"cpu": ("fused", *build.TRIED["cpu"])})


def test_a_kernel_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net that is added to what is tried is a candidate; if it cannot be made, the others are."""
    nets = {"fused": failing(RuntimeError("ptxas: too many registers\n...")), **build.NETS}
    tried_too(monkeypatch, nets)
    assert isinstance(begun(tmp_path).step.net, TwinNet)
    assert refusals(tmp_path)["fused fp32"] == "ptxas: too many registers"


def test_a_net_that_fails_when_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(EagerNet):
        calls = 0

        def input_grad(self, *arguments: Any) -> torch.Tensor:
            Fails.calls += 1
            if Fails.calls > 1:
                raise MEMORY
            return super().input_grad(*arguments)

    nets = {"fused": lambda model, precision, sample: Fails(model, precision), **build.NETS}
    tried_too(monkeypatch, nets)
    assert isinstance(begun(tmp_path).step.net, TwinNet)
    assert refusals(tmp_path)["fused fp32"] == "CUDA out of memory. Tried to allocate 2 GiB."


def test_nothing_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ledger, "share", failing(ValueError()))
    train.run(config("--epochs=1"), tmp_path / "tried", quiet=True)
    assert record(tmp_path / "tried")["why"] == "by rule: nothing passed its trial"
    assert "nothing passed its trial; twin fp32 goes on" in capsys.readouterr().err
    assert not cache.folder().exists()
    train.run(config("--epochs=1", "--precision.engine=twin"), tmp_path / "named", quiet=True)
    assert_same(state(tmp_path / "tried"), state(tmp_path / "named"))


def test_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "LIMIT", 0.0)
    assert isinstance(begun(tmp_path).step.net, TwinNet)
    assert refusals(tmp_path) == {"twin fp32": "", "eager fp32": trial.LATE}
    assert not cache.folder().exists()  # another start has more time, perhaps


def test_the_time_is_up_before_the_whole_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest was not looked at, so what would be taken without a trial goes on."""
    clock(monkeypatch, of_eager)
    late = iter([0.0] * 6 + [99.0] * 99)
    monkeypatch.setattr(start, "LIMIT", 10.0)
    monkeypatch.setattr(trial.Spent, "seconds", property(lambda self: next(late)))
    monkeypatch.setattr(Ledger, "row", failing(AssertionError("the whole ledger")))
    assert isinstance(begun(tmp_path).step.net, TwinNet)
    assert [t["milliseconds"] for t in record(tmp_path)["tried"]] == pytest.approx([100, 50])


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path / "file"))
    begun(tmp_path)
    assert "engine: the choice is not kept for the next start" in capsys.readouterr().err


# in a later epoch ---------------------------------------------------------------------------------------------
def test_a_breach_in_a_later_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start all are right; in the second phase the twin is not, and the run goes on as eager from there."""
    share, later = Ledger.share, {"on": False}

    def shares(self: Ledger, net: Any) -> float:
        return 0.9 if later["on"] and isinstance(net, TwinNet) else share(self, net)

    trainer = begun(tmp_path)
    monkeypatch.setattr(Ledger, "share", shares)
    begin = engine.Engine.begin

    def begins(self: engine.Engine, epoch: int, *rest: Any) -> Any:
        later["on"] = epoch == 2
        return begin(self, epoch, *rest)

    monkeypatch.setattr(engine.Engine, "begin", begins)
    assert isinstance(trainer.step.net, TwinNet)
    trainer.train()
    assert isinstance(trainer.step.net, EagerNet)
    told = record(tmp_path)
    assert told["chosen"]["name"] == "eager fp32"
    assert [f["epoch"] for f in told["fallbacks"]] == [2]
    line = "engine: twin fp32: mass agreeing 0.9000, less than 0.995; eager fp32 goes on"
    assert line in capsys.readouterr().err


def test_when_it_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each phase and every few epochs, never in the middle of one: so a run that was stopped goes on alike."""
    trainer = begun(tmp_path, "--epochs=12", "--warmup_epochs=7")
    looks: list[int] = []
    monkeypatch.setattr(engine.Engine, "look_again", lambda self, epoch, *rest: looks.append(epoch))
    for epoch in range(1, 13):
        for first in (0, 1):
            trainer.engine.begin(epoch, first, trainer._key(epoch))
    assert looks == [6, 8, 11]
    trainer.engine.record.how = "pin"
    trainer.engine.begin(1, 0, trainer._key(1))
    assert looks[-1] == 1
    trainer.engine.record.how = "rule"
    trainer.engine.begin(1, 0, trainer._key(1))
    assert looks == [6, 8, 11, 1]


def test_when_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = begun(tmp_path)
    monkeypatch.setattr(Ledger, "share", lambda self, net: 0.5)
    trainer.engine.begin(6, 0, trainer._key(6))
    assert "it goes on, as there is nothing else" in capsys.readouterr().err
    assert trainer.engine.record.chosen.net == "eager"


def test_going_on_where_the_choice_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a machine without the GPU that the run was begun on."""
    clock(monkeypatch, of_eager)
    train.run(config("--epochs=1"), tmp_path, quiet=True)
    monkeypatch.setitem(build.NETS, "eager", failing(RuntimeError("no such device")))
    train.run(config("--epochs=2"), tmp_path, quiet=True)
    assert "engine: eager fp32 fails here (no such device); twin fp32 goes on" in capsys.readouterr().err


def test_the_reference_is_the_model_itself() -> None:
    step = make_step()
    ledger = Ledger(step.model, CPU32, batch(0)[0], 8 / 255, "eval")
    row = ledger.row(EagerNet(step.model, CPU32))
    assert breach(row) == ""
    assert row["mass_agreeing"] == pytest.approx(1)

    class Against(EagerNet):
        def input_grad(self, *arguments: Any) -> torch.Tensor:
            return -super().input_grad(*arguments)

    wrong = ledger.row(Against(step.model, CPU32))
    assert wrong["mass_agreeing"] < 0.01
    assert wrong["loss_ratio"] < row["loss_ratio"]
