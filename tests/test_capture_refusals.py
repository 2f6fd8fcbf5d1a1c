"""What cannot be captured: refused at construction with the reason, or at the first call by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_cases import AT, assert_same, batch, capture, make_step, values
from fake_recorder import FakeRecorder
from method_cases import Crafted, method

from mwpb_fast.capture import CapturedStep, check_batches
from mwpb_fast.config import ConfigError, PrecisionConfig
from mwpb_fast.engine.precision import Precision, make_precision
from mwpb_fast.method import Batch, Method
from mwpb_fast.perturbations import none


def hooked(f: Any) -> Method:
    """A method whose attack's result goes through f(x, y)."""
    attack = AT.attack

    def attacked(net: Any, batch: Batch, *rest: Any) -> torch.Tensor:
        return f(attack(net, batch, *rest), batch.y)

    return method(attack=Crafted(attacked))


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x, y: x * float(x.sum().item() > 0), "aten::_local_scalar_dense"),
        (lambda x, y: x if x.sum() > 0 else -x, "aten::_local_scalar_dense"),
        (lambda x, y: x + (y == 3).nonzero().sum(), "aten::nonzero"),
        (lambda x, y: x + x[y > 5].sum(), "aten::index"),
        (lambda x, y: x.index_put((y > 5,), torch.zeros(())), "aten::index_put"),
        (lambda x, y: x + x.masked_select(x > 0.5).sum(), "aten::masked_select"),
        (lambda x, y: x + y.unique().sum(), "aten::_unique2"),
        (lambda x, y: x + 0 * torch.rand_like(x), "aten::rand_like"),
        (lambda x, y: torch.nn.functional.dropout(x, 0.5), "aten::bernoulli"),
        (lambda x, y: x + x.to("meta").sum().shape.numel(), "aten::_to_copy works across devices"),
    ],
)
def test_what_waits_for_the_device_is_refused_by_name(f: Any, name: str) -> None:
    step = make_step()
    before = values(step)
    captured = capture(step)
    with pytest.raises(ConfigError, match=name):
        captured(*batch(0), hooked(f))
    assert_same(values(step), before)


@pytest.mark.parametrize("error", [ConfigError("not permitted"), torch.OutOfMemoryError("out of memory")])
def test_a_recording_that_fails_leaves_the_step_as_it_was(error: Exception) -> None:
    class Failing(FakeRecorder):
        def capture(self, function: Any) -> None:
            super().capture(function)
            raise error

    step, alive = make_step(), FakeRecorder.alive
    before = values(step)
    with pytest.raises(type(error)):
        CapturedStep(step, make_recorder=Failing)(*batch(0), AT)
    assert FakeRecorder.alive == alive  # its memory is freed
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert_same(values(step), before)


def test_what_is_made_once_may_wait_once() -> None:
    made: list[float] = []

    def once(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not made:
            made.append(y.max().item())
        return x * min(1.0, made[0] + 1)

    capture(make_step())(*batch(0), hooked(once))


def test_a_wait_in_the_backward_pass_is_refused_by_name() -> None:
    step = make_step()
    next(step.model.parameters()).register_hook(lambda g: g * g.abs().max().item())
    with pytest.raises(ConfigError, match="_local_scalar_dense"):
        capture(step)(*batch(0), AT)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": make_precision(PrecisionConfig(device="cpu", oracle=True))}, "oracle"),
        ({"precision": Precision(torch.device("cpu"), torch.float16, torch.channels_last, False)}, "loss scaling"),
        ({"optimizer": "number"}, "learning rate is a number"),
        ({"optimizer": "late"}, "allocates its momentum"),
    ],
)
def test_what_cannot_be_captured_is_refused_at_construction(options: dict[str, Any], reason: str) -> None:
    step = make_step()
    if "optimizer" in options:
        rate = 0.1 if options["optimizer"] == "number" else torch.tensor(0.1)
        options = {"optimizer": torch.optim.SGD(step.model.parameters(), lr=rate, momentum=0.9, fused=True)}
    for name, value in options.items():
        setattr(step, name, value)
    step.__post_init__()
    with pytest.raises(ConfigError, match=reason):
        capture(step)


def test_an_axis_may_refuse() -> None:
    class Unfit(none.Nothing):
        uncapturable = "it asks the host for the number of steps"

    with pytest.raises(ConfigError, match=r"Unfit: it asks the host"):
        capture(make_step())(*batch(0), method(perturb=Unfit()))


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ConfigError, match="CUDA device"):
        CapturedStep(make_step())


def test_another_batch_size_is_refused() -> None:
    captured = capture(make_step())
    captured(*batch(0), AT)
    with pytest.raises(ValueError, match="same size"):
        captured(*batch(1, size=5), AT)
    check_batches(100, 25, "keep")
    check_batches(110, 25, "drop")
    with pytest.raises(ConfigError, match="leave 10 for the last batch"):
        check_batches(110, 25, "keep")
