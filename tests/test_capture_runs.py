"""Whole runs with the captured step, on a fake stream of operations; the captured step on a real GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import CPU, OBJECTIVES, batch, make_step
from fake_recorder import FakeRecorder
from method_cases import method
from test_train import TINY, StopAfter, assert_same, final_state, tiny
from twin_cases import needs_bf16

from mwpb_fast import capture, data, train
from mwpb_fast.config import ConfigError, OptimConfig, PrecisionConfig, recipe, resolve
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.engine.recorder import Watch, tensors
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Batch
from mwpb_fast.models import build_model
from mwpb_fast.optim import Average, make_optimizer
from mwpb_fast.step import Step
from mwpb_fast.system.signals import Interrupted

OPTIONS = ("--epochs=3", "--warmup_epochs=1", "--data.subset=192", "--optim.ema=0.9", "--optim.drops=[3]")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[capture.CapturedStep]:
    """Trainers capture with the fake; the captured steps that they make."""
    made: list[capture.CapturedStep] = []

    def make(*arguments: Any) -> capture.CapturedStep:
        made.append(captured_step(*arguments))
        return made[-1]

    captured_step = functools.partial(capture.CapturedStep, make_recorder=FakeRecorder)
    monkeypatch.setattr(capture, "CapturedStep", make)
    return made


def state(folder: Path) -> dict[str, Any]:
    found = final_state(folder)
    found["config"]["precision"].pop("capture")
    return found


@pytest.mark.parametrize("engine", ["eager", "twin"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_captured_run_is_the_eager_run_byte_for_byte(
    tmp_path: Path, faked: list[capture.CapturedStep], objective: str, engine: str
) -> None:
    options = (*OPTIONS, f"--objective={objective}", f"--precision.engine={engine}")
    before = FakeRecorder.alive
    train.run(tiny(*options), tmp_path / "eager", quiet=True)
    train.run(tiny(*options, "--precision.capture=true"), tmp_path / "captured", quiet=True)
    assert_same(state(tmp_path / "eager"), state(tmp_path / "captured"))
    assert FakeRecorder.alive == before  # what was recorded is freed at the end
    assert [c.captures for c in faked] == [2]  # the warm-up phase and the main one; not the drop of the rate


def test_a_captured_run_with_memory_and_perturbed_weights(
    tmp_path: Path, faked: list[capture.CapturedStep]
) -> None:
    """IAAT, whose radii are remembered for each image, and AWP, stopped in the middle of an epoch."""
    axes = ("--attack=adaptive", "--attack.steps=2", "--attack.warmup_epochs=1", "--perturbation=awp")
    options = ("--epochs=3", "--warmup_epochs=1", "--data.subset=192", "--budget=fixed", *axes)
    options = tuple(o for o in TINY if not o.startswith("--attack")) + options
    recipe_of = functools.partial(resolve, recipe("digits.mwpb_at"), [])
    train.run(recipe_of([*options]), tmp_path / "eager", quiet=True)
    config, stop = recipe_of([*options, "--precision.capture=true"]), StopAfter(4)
    with pytest.raises(Interrupted):
        train.Trainer(config, tmp_path / "captured", stop, quiet=True).train()  # type: ignore[arg-type]
    train.run(config, tmp_path / "captured", quiet=True)
    assert_same(state(tmp_path / "eager"), state(tmp_path / "captured"))
    assert state(tmp_path / "captured")["memory"]["attack"]["radius"].any()


@pytest.mark.parametrize("cut", [2, 4])
def test_a_captured_run_goes_on_in_the_middle_of_an_epoch(
    tmp_path: Path, faked: list[capture.CapturedStep], cut: int
) -> None:
    config = tiny(*OPTIONS, "--precision.capture=true")
    train.run(config, tmp_path / "whole", quiet=True)
    stop: Any = StopAfter(cut)
    with pytest.raises(Interrupted):
        train.Trainer(config, tmp_path / "cut", stop, quiet=True).train()
    train.run(config, tmp_path / "cut", quiet=True)
    assert_same(state(tmp_path / "whole"), state(tmp_path / "cut"))


def test_images_that_the_host_feeds(
    tmp_path: Path, faked: list[capture.CapturedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that cannot gather inside the graph, as DALI's, gives its batches from outside."""

    class Fed:
        def __init__(self, loader: data.ResidentLoader) -> None:
            self.loader = loader

        def __len__(self) -> int:
            return len(self.loader)

        def epoch(self, epoch: int, start: int = 0) -> Iterator[data.Batch]:
            return self.loader.epoch(epoch, start)

        def close(self) -> None:
            self.loader.close()

    options = (*OPTIONS, "--precision.capture=true")
    train.run(tiny(*options), tmp_path / "gathered", quiet=True)
    make_loader = data.make_loader
    monkeypatch.setattr(data, "make_loader", lambda *a, **k: Fed(make_loader(*a, **k)))  # type: ignore[arg-type]
    train.run(tiny(*options), tmp_path / "fed", quiet=True)
    assert_same(state(tmp_path / "gathered"), state(tmp_path / "fed"))
    assert [c._gather is None for c in faked] == [False, True]


def test_refusals_of_a_run(tmp_path: Path, faked: list[capture.CapturedStep]) -> None:
    options = ("--precision.capture=true", "--data.batch_size=64", "--data.last_batch=keep")
    with pytest.raises(ConfigError, match="leave 8 for the last batch"):
        train.Trainer(tiny(*options), tmp_path, StopAfter(0))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eagerly, without capture"):
        tiny("--precision.capture=true", "--precision.oracle=true")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_run_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need a CUDA device"):
        train.run(tiny("--precision.capture=true"), tmp_path, quiet=True)


# the attack's own dtype ---------------------------------------------------------------------------------------
@needs_bf16
@pytest.mark.parametrize("engine", ["eager", "twin"])
def test_the_attack_may_have_a_dtype_of_its_own(tmp_path: Path, engine: str) -> None:
    config = tiny(f"--precision.engine={engine}", "--precision.attack_dtype=bf16", "--precision.device=cpu")
    trainer = train.Trainer(config, tmp_path / "bf16", StopAfter(1000), quiet=True)  # type: ignore[arg-type]
    net: Any = trainer.step.net
    assert (net.dtype if engine == "twin" else net.precision.dtype) == torch.bfloat16
    assert trainer.step.precision.dtype == torch.float32
    seen = set()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, i, o: seen.add(o.dtype) if m.training and torch.is_grad_enabled() else None
            )
    trainer.train()
    assert seen == {torch.float32}  # of the training passes
    train.run(tiny(f"--precision.engine={engine}"), tmp_path / "fp32", quiet=True)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("bf16", "fp32")]
    low, full = (json.loads(line)["loss"] for line in lines)
    assert low != full
    assert low == pytest.approx(full, rel=5e-2)


def test_attack_dtypes() -> None:
    auto = make_precision(PrecisionConfig(device="cpu"))
    assert auto.attack.dtype == auto.dtype == torch.float32
    for wrong in ({"attack_dtype": "fp16"}, {"attack_dtype": "bf16", "oracle": True}):
        with pytest.raises(ValueError, match=r"attack_dtype must be|oracle computes in fp32"):
            PrecisionConfig(**wrong)


# without values -----------------------------------------------------------------------------------------------
SWITCHES: dict[str, Any] = {"natural_pass": True, "clip_norm": 1.0}


class WithoutValues(Watch):
    """PyTorch's fused SGD has no form for tensors without values; its arguments are looked at all the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._fused_sgd_:
            assert {t.device.type for t in tensors((args, kwargs))} == {"meta"}
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize(("objective", "switches"), [(o, {}) for o in OBJECTIVES] + [("at", SWITCHES)])
def test_a_step_stays_on_its_device_and_needs_no_value(objective: str, switches: dict[str, Any]) -> None:
    """On the meta device a tensor has no values that the host could read, and nothing mixes with the CPU."""
    with torch.device("meta"):
        model = build_model("smallresnet-8", num_classes=10, channels=3)
        x, y, index = torch.empty(6, 3, 8, 8), *torch.empty(2, 6, dtype=torch.int64)
        key = torch.empty(1, dtype=torch.int64)
    step = Step(
        model=model,
        net=EagerNet(model, CPU),
        optimizer=make_optimizer(model, OptimConfig()),
        precision=CPU,
        average=Average(model, 0.9),
        **switches,
    )
    step.optimizer._need_device_dtype_check_for_fused = False  # type: ignore[attr-defined]
    with WithoutValues():
        result = step.compute(Batch(x, y, index), key, method(objective))
    assert result.loss.device.type == result.radius.device.type == "meta"


# on a GPU -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["eager", "twin"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_cuda_graph_replays_the_eager_step(objective: str, engine: str, dtype: str) -> None:
    precision = make_precision(PrecisionConfig(device="cuda", dtype=dtype))
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # else a convolution's weight gradient may differ by itself
    try:
        model = build_model("smallresnet-16", num_classes=10, channels=3)
        model = model.cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        first = batch(0, 32)[0].x.cuda()
        step = make_step(
            model=model,
            net=TwinNet(model, precision, first) if engine == "twin" else EagerNet(model, precision),
            optimizer=make_optimizer(model, OptimConfig()),
            average=Average(model, 0.9),
            precision=precision,
        )
        captured = capture.CapturedStep(step)
        for number in range(4):
            images, key = batch(number, 32)
            inputs = Batch(*(t.cuda() for t in images)), key.cuda(), method(objective)
            assert captured.verify(*inputs) == []
            assert captured(*inputs).finite.item()
        assert captured.captures == 1
        captured.forget()
    finally:
        torch.backends.cudnn.deterministic = deterministic


@pytest.mark.gpu
def test_a_run_on_a_gpu_captures(tmp_path: Path) -> None:
    options = (*OPTIONS, "--precision.device=cuda", "--precision.engine=twin")
    for name in ("captured", "eager"):
        config = tiny(*options, f"--precision.capture={str(name == 'captured').lower()}")
        train.run(config, tmp_path / name, quiet=True)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("captured", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
