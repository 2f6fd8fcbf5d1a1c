"""The twin's fused variants as candidates: offered on CUDA alone, refused and left in a line, had by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from choice_cases import MEMORY, begun, config, failing, graphs, record, refusals, tried
from test_choice import names, on
from twin_cases import CPU32, ours

from mwpb_fast import train
from mwpb_fast.choice import candidates, trial
from mwpb_fast.choice.ledger import Ledger
from mwpb_fast.config import ConfigError, PrecisionConfig
from mwpb_fast.config.schema import ENGINES
from mwpb_fast.engine import build
from mwpb_fast.engine.twin import BY_HAND, PLAIN, TwinNet

FIXTURES = (graphs, tried)
CUDA = torch.device("cuda")


@pytest.fixture
def offered(tried: None, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for CUDA: graphs, and as candidates all that there are."""
    monkeypatch.setattr(candidates, "TRIED", {"cpu": tuple(build.NETS)})


def faster(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Steps on that variant take half of the others' time."""

    def time_steps(self: trial.Trial, step: Any) -> float:
        step()
        return 50.0 if getattr(self.step.net, "variant", "") == variant else 100.0

    monkeypatch.setattr(trial.Trial, "_time_steps", time_steps)


# what is offered ----------------------------------------------------------------------------------------------
def test_every_name_of_a_net_is_an_option() -> None:
    for name in build.NETS:
        assert PrecisionConfig(engine=name).engine == name
    assert {"auto", *build.NETS} == set(ENGINES)
    with pytest.raises(ValueError, match=r"auto, eager, twin, .* or one_kernel_stem, not fused"):
        PrecisionConfig(engine="fused")
    for name in build.NETS.keys() - {"twin"}:
        with pytest.raises(ValueError, match="it needs engine=twin or auto"):
            PrecisionConfig(engine=name, tune=True)


def test_what_is_offered() -> None:
    """by_hand on CUDA alone, and halves in a graph there; what has never run on a device nowhere, as a trial could
    not undo its faults."""
    for device, there in (("cuda", True), ("cpu", False)):
        for tier in names(on(device, torch.bfloat16)):
            assert any(c.startswith("by_hand ") for c in tier) == there
            assert not any(c.split()[0] in build.OF_TRITON for c in tier)
            graphed = [c for c in tier if c.startswith("halves")]
            assert len(graphed) == there
            assert all(c.endswith(", captured") for c in graphed)
    assert names(on("cpu"), "--precision.engine=by_hand") == (["by_hand fp32"], [])
    for name in build.OF_TRITON:
        named = names(on("cuda"), f"--precision.engine={name}", "--precision.capture=true")
        assert named == ([f"{name} fp32, captured"], [])
    in_train_mode, _ = names(on("cuda", torch.bfloat16), "--attack_mode=train")
    assert in_train_mode == ["eager bf16, captured", "eager bf16"]


@pytest.mark.parametrize("name", ["one_kernel", "by_hand_stem", "one_kernel_stem"])
def test_kernels_need_cuda_and_triton(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert build.lacking(name, torch.device("cpu")).endswith("serve CUDA alone; take twin or by_hand")
    assert not any(build.lacking(name, torch.device("cpu")) for name in ("twin", "by_hand", "eager"))
    monkeypatch.setattr(ops, "implementation", lambda name, device: "triton")
    assert build.lacking(name, CUDA) == ""
    monkeypatch.setattr(ops, "implementation", lambda name, device: "reference")
    monkeypatch.setattr(ops, "triton_problem", "Triton is not installed")
    assert "serve CUDA alone, and Triton is not installed; take" in build.lacking(name, CUDA)


# a trial ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("offered")
def test_the_fastest_of_them_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster(monkeypatch, BY_HAND)
    train.run(config("--epochs=1"), tmp_path / "chosen", quiet=True)
    told = record(tmp_path / "chosen")
    assert told["chosen"]["name"] == "by_hand fp32, captured"
    assert not told["fallbacks"]
    found = refusals(tmp_path / "chosen")
    assert list(found)[: len(build.NETS)] == [f"{name} fp32, captured" for name in build.NETS]
    for name, refused in found.items():
        assert bool(refused) == (name.split()[0] in build.OF_TRITON | {"halves"})
    assert found["one_kernel fp32"] == build.lacking("one_kernel", torch.device("cpu"))
    # and the run that goes on has it again
    trainer = begun(tmp_path / "chosen", "--epochs=1")
    assert trainer.engine.record.chosen.net == "by_hand"


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("error", [MEMORY, RuntimeError("ptxas: too many registers\n..."), KeyError()])
def test_kernels_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    faster(monkeypatch, BY_HAND)
    monkeypatch.setattr(ops, "gated_sum", failing(error))
    trainer = begun(tmp_path)
    assert trainer.engine.record.chosen.net == "twin"
    found = refusals(tmp_path)
    said = str(error).split("\n")[0] or "KeyError"
    assert said in found["by_hand fp32, captured"]
    assert said in found["by_hand fp32"]
    assert found["twin fp32, captured"] == found["eager fp32, captured"] == ""


@pytest.mark.usefixtures("offered")
def test_a_breach_in_a_later_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a variant's signs disagree it goes, captured or not, and the twin goes on."""
    faster(monkeypatch, BY_HAND)
    trainer = begun(tmp_path)
    share = Ledger.share
    wrong = lambda self, net: 0.9 if getattr(net, "variant", "") == BY_HAND else share(self, net)  # noqa: E731
    monkeypatch.setattr(Ledger, "share", wrong)
    trainer.engine.begin(6, 0, trainer._key(6))
    assert trainer.engine.record.chosen.net == "twin"
    assert isinstance(trainer.step.net, TwinNet)
    assert trainer.step.net.variant == PLAIN
    assert "engine: by_hand fp32, captured: mass agreeing 0.9000" in capsys.readouterr().err


# by name ------------------------------------------------------------------------------------------------------
def test_a_named_variant_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = begun(tmp_path, "--precision.engine=by_hand")
    assert isinstance(trainer.step.net, TwinNet)
    assert trainer.step.net.variant == BY_HAND
    assert (record(tmp_path)["how"], record(tmp_path)["chosen"]["name"]) == ("option", "by_hand fp32")
    with pytest.raises(ConfigError, match=r"^precision.engine: one_kernel is made of Triton kernels"):
        begun(tmp_path / "other", "--precision.engine=one_kernel")


def test_records_of_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pin of what cannot be had is refused; a run that goes on does so as it would without."""
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path / "cache"))
    trainer = begun(tmp_path / "run")
    chosen = {"net": "one_kernel", "dtype": "fp32"}
    pin = tmp_path / "engine.json"
    pin.write_text(json.dumps({"chosen": chosen}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^precision.pin: one_kernel fp32: one_kernel is made of Triton"):
        begun(tmp_path / "pinned", f"--precision.pin={pin}")
    trainer.engine.load({"engine": {"chosen": chosen, "how": "trial"}})
    assert trainer.engine.record.chosen.net == "twin"
    assert "one_kernel fp32 fails here (one_kernel is made of" in capsys.readouterr().err


def test_the_plain_twin_alone_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config("--precision.tune=true", "--precision.capture=false")
    first, _ = candidates.candidates(asked, on("cuda", torch.bfloat16))
    assert [str(c) for c in first if c.tuned] == ["twin bf16, tuned"]
    model, sample = ours("smallresnet-4")(), torch.rand(2, 3, 8, 8)
    net, layers = build.build_net("by_hand", model, dataclasses.replace(CPU32), sample, False, False)
    assert isinstance(net, TwinNet)
    assert (net.variant, layers) == (BY_HAND, [])
