"""Whole runs on digits: what they leave behind, exact resumption, stopping, and failures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mwpb_fast import train
from mwpb_fast.config import Config, ConfigError, from_dict, recipe, resolve
from mwpb_fast.engine import build
from mwpb_fast.engine.layers import FUSED, PLAIN, FoldedConv
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import read_records
from mwpb_fast.system.signals import Interrupted

TIMES = ("seconds", "images_per_second", "wait_share", "checkpoint", "validation")
TINY = ["--epochs=2", "--warmup_epochs=1", "--data.subset=200", "--model.name=smallresnet-8", "--attack.steps=2"]


def tiny(*options: str) -> Config:
    return resolve(recipe("digits.mwpb_at"), [], [*TINY, *options])


def final_state(folder: Path) -> dict[str, Any]:
    found = checkpoint.read_newest(folder / "checkpoints", "last")
    assert found is not None
    return found[1]


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    else:
        assert one == other, where


def test_a_run_leaves_its_records(tmp_path: Path) -> None:
    config = tiny()
    record = train.run(config, tmp_path, quiet=True)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["epoch"] for r in records] == [1, 2]
    assert [r["phase"] for r in records] == ["warmup", "main"]
    assert records[-1] == record
    for r in records:
        assert math.isfinite(r["loss"])
        assert {"natural", "robust", "learning_rate", "images_per_second"} <= r.keys()
        assert 0 < r["wait_share"] < 1
        assert 0 <= r["robust"] <= r["natural"] <= 100
    assert records[0]["radius_min"] == records[0]["radius_max"] == pytest.approx(16 / 255)
    low, high = math.exp(-0.58) * 32 / 255, math.exp(0.58) * 32 / 255
    assert low * (1 - 1e-6) <= records[1]["radius_min"] < records[1]["radius_max"] <= high * (1 + 1e-6)
    assert from_dict(yaml.safe_load((tmp_path / "config.yaml").read_text())) == config
    radii = json.loads((tmp_path / "radii.json").read_text())
    assert len(radii["radii"]) == 200
    assert radii["budget"]["eps"] == "32/255"
    assert all(low * (1 - 1e-6) <= r <= high * (1 + 1e-6) for r in radii["radii"])
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__


class StopAfter:
    """A stop request that comes true after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def number(self) -> int:
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else 0


@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_a_stopped_run_goes_on_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, cut: int
) -> None:
    config = tiny(f"--objective={objective}", "--data.subset=192", "--optim.ema=0.9")
    train.run(config, tmp_path / "whole", quiet=True)
    trainer = train.Trainer(config, tmp_path / "cut", StopAfter(cut), quiet=True)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        trainer.train()
    train.run(config, tmp_path / "cut", quiet=True)
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    assert_same(whole, resumed)
    timeless = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in read_records(f)]
        for f in (tmp_path / "whole/metrics.jsonl", tmp_path / "cut/metrics.jsonl")
    ]
    assert timeless[0] == timeless[1]


def test_two_runs_are_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.run(tiny(f"--seed={seed}", "--epochs=1"), tmp_path / name, quiet=True)
    a, b, c = (final_state(tmp_path / name)["model"] for name in "abc")
    assert_same(a, b)
    assert not torch.equal(a["linear.weight"], c["linear.weight"])


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        train.run(tiny("--epochs=1", "--seed=9"), tmp_path, quiet=True)
    train.run(tiny("--epochs=1", "--seed=9"), tmp_path, resume=False, quiet=True)
    assert final_state(tmp_path)["config"]["seed"] == 9


def test_a_run_goes_on_with_its_data_elsewhere_and_after_new_options(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    path = checkpoint.existing(tmp_path / "checkpoints", "last")[0]
    state = checkpoint.read(path)
    del state["config"]["precision"]["capture"]  # as a version wrote it that did not know the option
    state["config"]["data"]["dir"] = "elsewhere"
    checkpoint.save(path.parent, "last", state["epoch"], state["batch"], state)
    assert train.run(tiny("--epochs=2", "--precision.device=cpu"), tmp_path, quiet=True)["epoch"] == 2
    with pytest.raises(ConfigError, match=r"other settings \(data, precision\)"):
        train.run(tiny("--epochs=2", "--data.flip=true", "--precision.engine=twin"), tmp_path, quiet=True)


def test_a_loss_that_stays_nan_ends_the_run_and_spares_the_weights(tmp_path: Path) -> None:
    config = tiny("--optim.lr=1e30", "--max_bad_steps=1", "--epochs=6", "--data.batch_size=16")
    with pytest.raises(train.TrainingError, match="not finite"):
        train.run(config, tmp_path, quiet=True)


def test_the_oracle_agrees_with_the_fused_ops(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1"), tmp_path / "fused", quiet=True)
    train.run(tiny("--epochs=1", "--precision.oracle=true"), tmp_path / "oracle", quiet=True)
    fused, oracle = (read_records(tmp_path / n / "metrics.jsonl")[0] for n in ("fused", "oracle"))
    assert fused["loss"] == pytest.approx(oracle["loss"], rel=1e-3)
    a, b = (final_state(tmp_path / n)["model"]["conv1.weight"] for n in ("fused", "oracle"))
    torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


def test_the_averaged_model_is_what_is_kept_as_best(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1", "--optim.ema=0.5"), tmp_path, quiet=True)
    last, best = final_state(tmp_path), checkpoint.read_newest(tmp_path / "checkpoints", "best")
    assert best is not None
    assert_same(best[1]["model"], last["ema"])
    assert not torch.equal(last["ema"]["linear.weight"], last["model"]["linear.weight"])


def test_normalisation_is_saved_with_the_run(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1", "--model.normalize=true"), tmp_path, quiet=True)
    mean, std = final_state(tmp_path)["normalize"]
    assert 0.2 < mean[0] < 0.4
    assert 0.3 < std[0] < 0.5


def processor_time(pid: int) -> float:
    """Of a process so far, in seconds; the fields behind its name, which may hold spaces, count from the state."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_checkpoint_and_leave(tmp_path: Path, number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "mwpb_fast", "train", "digits.mwpb_at", "--out", str(tmp_path)]
    options = ["--epochs=500", "--warmup_epochs=1", "--model.name=smallresnet-8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe, before = subprocess.PIPE, resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = before.ru_utime + before.ru_stime  # by other children
    process = subprocess.Popen([*command, *options], stdout=pipe, stderr=pipe, env=environment)
    while not checkpoint.existing(tmp_path / "checkpoints", "last"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    asked = processor_time(process.pid)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == status, error
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime + used.ru_stime - ended - asked < 20
    assert b"goes on from here" in error
    assert final_state(tmp_path)["epoch"] >= 1


def test_the_paper_schedule_changes_budget_after_the_warm_up(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny(), epochs=3, warmup_epochs=2)
    train.run(config, tmp_path, quiet=True)
    assert [r["phase"] for r in read_records(tmp_path / "metrics.jsonl")] == ["warmup", "warmup", "main"]


def test_a_tuned_run_keeps_its_choices_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock decides, so a second measurement may choose otherwise: here it does."""
    config = tiny("--precision.engine=twin", "--precision.tune=true", "--epochs=2")
    trainer = train.Trainer(config, tmp_path, StopAfter(2), quiet=True)  # type: ignore[arg-type]
    first = trainer.choices
    assert first
    assert all(r["reason"] for r in first)
    with pytest.raises(Interrupted):
        trainer.train()
    assert json.loads((tmp_path / "engine.json").read_text())["layers"] == first

    def otherwise(twin: TwinNet, x: torch.Tensor, captured: bool) -> list[dict[str, Any]]:
        return [r | {"chosen": FUSED if r["chosen"] == PLAIN else PLAIN} for r in first]

    monkeypatch.setattr(build, "tune", otherwise)
    trainer = train.Trainer(config, tmp_path, StopAfter(100), quiet=True)  # type: ignore[arg-type]
    trainer.train()
    assert json.loads((tmp_path / "engine.json").read_text())["layers"] == first
    assert isinstance(trainer.step.net, TwinNet)
    taken = {
        layer.name: layer.implementation for layer in trainer.step.net.layers if isinstance(layer, FoldedConv)
    }
    assert taken == {r["layer"]: r["chosen"] for r in first}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), TwinNet),
        (("--attack_mode=train",), EagerNet),
        (("--precision.oracle=true",), EagerNet),
        (("--precision.engine=eager",), EagerNet),
    ],
)
def test_the_attack_is_on_the_twin_where_that_is_in_bounds(
    tmp_path: Path, options: tuple[str, ...], expected: type
) -> None:
    config = tiny("--precision.device=cpu", *options)
    trainer = train.Trainer(config, tmp_path, StopAfter(1), quiet=True)  # type: ignore[arg-type]
    assert type(trainer.step.net) is expected


@pytest.mark.slow
def test_a_compiled_training_pass_is_the_eager_one(tmp_path: Path) -> None:
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        config = tiny("--optim.ema=0.9", f"--precision.compile={compiled}")
        trainer = train.Trainer(config, tmp_path / name, StopAfter(100), quiet=True)  # type: ignore[arg-type]
        assert isinstance(trainer.step.trained, torch._dynamo.OptimizedModule) == (name == "compiled")
        trainer.train()
    eager, compiled = (final_state(tmp_path / name)["model"] for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


def test_a_compiler_that_fails_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(function: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(
        ConfigError, match=r"^precision.compile: torch.compile does not work here: no C\+\+ compiler$"
    ):
        train.run(tiny("--precision.compile=true"), tmp_path, quiet=True)


def test_the_twin_engine_trains_as_the_model_itself(tmp_path: Path) -> None:
    for engine in ("eager", "twin"):
        train.run(tiny(f"--precision.engine={engine}"), tmp_path / engine, quiet=True)
    eager, twin = (read_records(tmp_path / engine / "metrics.jsonl") for engine in ("eager", "twin"))
    for one, other in zip(eager, twin, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)
        assert one["radius_mean"] == pytest.approx(other["radius_mean"], rel=2e-2)
