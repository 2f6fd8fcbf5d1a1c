"""What a training step costs in operator calls, kernel launches and waits: it fails where one of them grows.

The counts of today are in step_operators.json. `python tests/test_step_cost.py` prints them anew, for when a
growth is meant, or to hold on to what was gained.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import ENGINES, OBJECTIVES, batch, make_step
from fake_recorder import gives_views, writes
from method_cases import method
from torch.utils._python_dispatch import TorchDispatchMode

from mwpb_fast.capture import CapturedStep
from mwpb_fast.config import ConfigError, OptimConfig, PrecisionConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.engine.recorder import Watch
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Batch
from mwpb_fast.models import build_model
from mwpb_fast.optim import make_optimizer
from mwpb_fast.step import Step

COUNTS = Path(__file__).with_name("step_operators.json")
FREE = ("aten::empty", "aten::new_empty", "aten::lift_fresh", "profiler::")  # no work on the device
STEPS = 2  # of the attack


class Counting(TorchDispatchMode):
    """Calls by operator; views and allocations do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = gives_views(func) and not writes(func) and func._schema.returns
        if not view and not func.name().startswith(FREE):
            self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def count(objective: str, engine: str) -> Counter[str]:
    """Operator calls of one step, after a first one."""
    step, asked, inputs = make_step(engine, ema=0.9), method(objective), batch(1)
    step(*batch(0), asked)
    with Counting() as counting:
        step(*inputs, asked)
    return counting.calls


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_operator_calls_do_not_grow(objective: str, engine: str) -> None:
    known: dict[str, int] = json.loads(COUNTS.read_text())[f"{objective}, {engine}"]
    found = count(objective, engine)
    grown = {k: f"{known.get(k, 0)} -> {n}" for k, n in sorted(found.items()) if n != known.get(k, 0)}
    grown |= {k: f"{n} -> 0" for k, n in sorted(known.items()) if k not in found}
    assert found.total() <= sum(known.values()), f"{sum(known.values())} -> {found.total()}: {grown}"
    heavy = ("convolution", "native_batch_norm", "addmm", "mm", "_fused_sgd_")
    for name in (*(f"aten::{h}" for h in heavy), *(k for k in found if k.startswith("mwpb::"))):
        assert found[name] <= known.get(name, 0), grown


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_counts_are_what_the_method_asks_for(objective: str) -> None:
    """Convolutions of the known counts, by reckoning: margin, attack steps, and one or two training passes."""
    known = json.loads(COUNTS.read_text())
    model = make_step().model
    layers = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    passes = 1 if objective == "at" else 2
    for engine in ENGINES:
        calls = known[f"{objective}, {engine}"]
        assert calls["aten::convolution"] == layers * (1 + STEPS + passes)
        # none has a weight gradient in the attack, but its input gradient is as much work to call
        assert calls["aten::convolution_backward"] == layers * (STEPS + passes)
        assert calls["mwpb::linf_step_"] == STEPS
        norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
        eager = norms * (1 + STEPS) if engine == "eager" else 0  # the twin has folded them
        assert calls["aten::native_batch_norm"] == norms * passes + eager


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_never_waits(objective: str, engine: str) -> None:
    step, inputs = make_step(engine, ema=0.9), [batch(0), batch(1)]
    with Watch():
        for one in inputs:
            result = step(*one, method(objective))
        with pytest.raises(ConfigError, match="_local_scalar_dense"):
            result.loss.item()


# on a GPU -----------------------------------------------------------------------------------------------------
def cuda_step(engine: str) -> tuple[Step, tuple[Batch, torch.Tensor]]:
    precision = make_precision(PrecisionConfig(device="cuda"))
    model = build_model("smallresnet-8", num_classes=10, channels=3)
    model = model.cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, key = batch(0)
    inputs = Batch(*(t.cuda() for t in images)), key.cuda()
    net = TwinNet(model, precision, inputs[0].x) if engine == "twin" else EagerNet(model, precision)
    optimizer = make_optimizer(model, OptimConfig())
    return make_step(model=model, net=net, optimizer=optimizer, precision=precision), inputs


def launches(function: Any) -> Counter[str]:
    """Calls of the CUDA runtime and driver that a function makes, by name."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return Counter({e.key: e.count for e in profile.key_averages() if e.key.startswith("cu")})


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kernel_launches_on_a_gpu(objective: str, engine: str) -> None:
    """Eagerly at most three kernels an operator call; captured, one graph and the copies of its inputs."""
    (step, inputs), asked = cuda_step(engine), method(objective)
    captured = CapturedStep(step)
    for _ in range(2):
        step(*inputs, asked)
        captured(*inputs, asked)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, asked)
        captured(*inputs, asked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    known = sum(json.loads(COUNTS.read_text())[f"{objective}, {engine}"].values())
    eager = launches(lambda: step(*inputs, asked))
    assert sum(n for name, n in eager.items() if "LaunchKernel" in name) <= 3 * known, eager
    replayed = launches(lambda: captured(*inputs, asked))
    assert sum(n for name, n in replayed.items() if "GraphLaunch" in name) == 1, replayed
    assert sum(n for name, n in replayed.items() if "LaunchKernel" in name) <= 4, replayed


if __name__ == "__main__":
    table = {f"{o}, {e}": dict(sorted(count(o, e).items())) for o in OBJECTIVES for e in ENGINES}
    print(json.dumps(table, indent=1))
