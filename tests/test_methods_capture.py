"""A step of every published method can be captured: it does not look at a value, and its shapes are fixed."""

from __future__ import annotations

from collections.abc import Sequence

import mwpb_kernels as ops
import pytest
import torch
from twin_cases import Operators, needs_bf16

from mwpb_fast.config import PrecisionConfig, recipe, resolve
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch, Method
from mwpb_fast.models import build_model
from mwpb_fast.optim import make_optimizer
from mwpb_fast.step import Step

MMA = ("--objective=mma", "--attack=anpgd")
ST = ("--objective=st", "--attack=squeeze", "--attack_mode=batch")
IAAT = ("--attack=adaptive", "--attack_mode=train")
METHODS = {
    "awp": ("digits.at", "--perturbation=awp"),
    "trades-awp": ("digits.trades", "--perturbation=awp"),
    "mma": ("digits.at", *MMA),
    "mwpb-mma-awp": ("digits.mwpb_at", *MMA, "--perturbation=awp"),
    "mwpb-st": ("digits.mwpb_at", *ST),
    "iaat warm-up": ("digits.at", *IAAT, "--attack.warmup_epochs=1"),
    "iaat": ("digits.trades", *IAAT, "--attack.warmup_epochs=0"),
}
WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::unique")


def parts(method: str, device: str, dtype: str = "fp32") -> tuple[Step, Method]:
    """The step, and the method in its first epoch."""
    name, *options = METHODS[method]
    config = resolve(recipe(name), [], [*options, "--attack.steps=2"])
    precision = make_precision(PrecisionConfig(device=device, dtype=dtype))
    torch.manual_seed(1)
    model = build_model("smallresnet-8", num_classes=10, channels=3).to(precision.device)
    whole = Method.build(config)
    whole.remember(100, precision.device)
    step = Step(
        model=model,
        net=EagerNet(model, precision),
        optimizer=make_optimizer(model, config.optim),
        precision=precision,
        attack_mode=config.attack_mode,
    )
    return step, whole.in_epoch(1)


def batch(device: str) -> tuple[Batch, torch.Tensor]:
    x, y, index = torch.rand(8, 3, 8, 8), torch.randint(10, (8,)), torch.randperm(100)[:8]
    images = Batch(*(t.to(device) for t in (x, y, index)))
    return images, torch.tensor([ops.derive_seed(1, 1)], device=device)


@pytest.mark.parametrize("method", METHODS)
def test_no_operator_waits_for_a_value(method: str) -> None:
    """All but the optimiser's own step, which on the CPU reads its found_inf."""
    step, asked = parts(method, "cpu")

    def update(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.isfinite(loss.detach()), step.clipped()

    step.update = update  # type: ignore[method-assign]
    with Operators() as seen:
        step(*batch("cpu"), asked)
    names = [name for name, _ in seen.calls]
    assert len(names) > 100
    for name, arguments in seen.calls:
        assert not name.startswith(WAITS), name
        if name.startswith("aten::index"):
            masks = [t for a in arguments if isinstance(a, Sequence) for t in a if isinstance(t, torch.Tensor)]
            assert all(t.dtype == torch.int64 for t in masks), name


@needs_bf16
@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bfloat16_is_finite(method: str) -> None:
    step, asked = parts(method, "cpu", "bf16")
    for _ in range(2):
        assert step(*batch("cpu"), asked).finite
    assert all(value.isfinite().all() for value in step.model.state_dict().values())


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_is_the_eager_one(method: str) -> None:
    """Three steps outside, then one captured and replayed; in float32 and with the optimiser's step."""
    results = []
    for captured in (False, True):
        torch.manual_seed(7)
        step, asked = parts(method, "cuda")
        images, key = batch("cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(images, key, asked)
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(images, key, asked)
            graph.replay()
        else:
            step(images, key, asked)
        results.append({k: v.clone() for k, v in step.model.state_dict().items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_half_precision_is_finite(method: str) -> None:
    step, asked = parts(method, "cuda", "fp16")
    finite = [bool(step(*batch("cuda"), asked).finite) for _ in range(4)]
    assert all(finite)
    assert all(value.isfinite().all() for value in step.model.state_dict().values())
