"""Steps, batches and comparisons for the tests of the captured step."""

from __future__ import annotations

from typing import Any

import mwpb_kernels as ops
import torch
from fake_recorder import FakeRecorder
from method_cases import method

from mwpb_fast.capture import CapturedStep
from mwpb_fast.config import OptimConfig, PrecisionConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Batch, Method
from mwpb_fast.models import build_model
from mwpb_fast.optim import Average, make_optimizer
from mwpb_fast.step import Step, StepResult

CPU = make_precision(PrecisionConfig(device="cpu"))
AT = method()
OBJECTIVES = ["at", "trades", "mart"]
ENGINES = ["eager", "twin"]


def make_step(engine: str = "twin", ema: float = 0.0, **options: Any) -> Step:
    torch.manual_seed(5)
    model = build_model("smallresnet-8", num_classes=10, channels=3).to(memory_format=torch.channels_last)
    net = TwinNet(model, CPU, batch(0)[0].x) if engine == "twin" else EagerNet(model, CPU)
    arguments: dict[str, Any] = dict(
        model=model,
        net=net,
        optimizer=make_optimizer(model, OptimConfig(lr=0.1)),
        precision=CPU,
        average=Average(model, ema) if ema else None,
    )
    return Step(**{**arguments, **options})


def batch(number: int, size: int = 6) -> tuple[Batch, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(size, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (size,), generator=generator)
    return Batch(x, y, torch.arange(size) + 100 * number), torch.tensor([ops.derive_seed(1, number)])


def capture(step: Step, **options: Any) -> CapturedStep:
    return CapturedStep(step, make_recorder=FakeRecorder, **options)


def values(step: Step, method: Method = AT) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in step.state(method).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_same_result(one: StepResult, other: StepResult) -> None:
    assert_same(one._asdict(), other._asdict())
