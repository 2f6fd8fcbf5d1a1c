"""Adversarial weight perturbation: hand values, a float64 re-derivation, and that it always undoes itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from method_cases import Crafted, method

from mwpb_fast.budgets import fixed
from mwpb_fast.config import OptimConfig, PrecisionConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch, Method
from mwpb_fast.objectives.at import AT
from mwpb_fast.optim import make_optimizer
from mwpb_fast.perturbations import awp, none
from mwpb_fast.step import Step

CPU = make_precision(PrecisionConfig(device="cpu"))
GAMMA = 0.05
MOMENTUM, DECAY, LR = 0.9, 5e-4, 0.1


class Mixed(torch.nn.Module):
    """Kernels, and every kind of parameter that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.norm = torch.nn.BatchNorm1d(2)
        self.table = torch.nn.Parameter(torch.ones(2, 2))  # of two dimensions, but not by name
        self.unused_weight = torch.nn.Parameter(torch.ones(2, 2))
        self.frozen_weight = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[3.0, 4.0]]))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_the_hand_value_for_a_gradient_of_any_size(size: float) -> None:
    """|w| = 5: v = .01 * 5 along the ascent (3, 4), so (.03, .04), and only kernels that the loss reaches move."""
    model = Mixed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    perturb = awp.Config(gamma=0.01).build()

    def loss() -> torch.Tensor:
        own = (model.linear.weight * torch.tensor([[3.0, 4.0]])).sum()
        return size * (own + model.linear.bias.sum() + model.norm.weight.sum() + model.table.sum())

    with perturb(model, loss):
        torch.testing.assert_close(model.linear.weight.detach(), torch.tensor([[3.03, 4.04]]), rtol=1e-6, atol=0)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name != "linear.weight"), name
        assert all(p.grad is None for p in model.parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=2e-7, atol=0)


def test_a_gradient_too_small_for_fp16_still_has_its_direction() -> None:
    """2e-8 is 0 in fp16; the loss is scaled before the backward pass, and the direction alone counts."""
    linear = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 4.0]]))
    x = torch.tensor([[1.0, 2.0]]).half()
    assert torch.tensor(2e-8).half() == 0
    with awp.Config(gamma=0.01).build()(linear, lambda: 2e-8 * (x @ linear.weight.half().t()).float().sum()):
        moved = linear.weight.detach() - torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(moved, 0.05 * torch.tensor([[1.0, 2.0]]) / math.sqrt(5), rtol=1e-2, atol=0)


def net() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3, stride=2),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 5),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(12, 3, 8, 8, generator=generator)
    y = torch.randint(5, (12,), generator=generator)
    return x, y, torch.arange(12), torch.tensor([1])


def shift(x: torch.Tensor) -> torch.Tensor:
    """An attack that gives the same image in float32 and float64."""
    return (x * 0.75 + 0.125).flip(3)


def shifted(objective: Any, perturb: Any) -> Method:
    return method(
        objective,
        attack=Crafted(lambda net, batch, *rest: shift(batch.x)),
        perturb=perturb,
        budget=fixed.Config().build(),
    )


def make_step() -> Step:
    model = net()
    return Step(
        model=model,
        net=EagerNet(model, CPU),
        optimizer=make_optimizer(model, OptimConfig(lr=LR, momentum=MOMENTUM, weight_decay=DECAY)),
        precision=CPU,
    )


def plain_at(model: torch.nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(x_adv), y)


def plain_trades(model: torch.nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z, a = model(x), model(x_adv)
    kl = (z.softmax(1) * (z.log_softmax(1) - a.log_softmax(1))).sum() / len(y)
    return torch.nn.functional.cross_entropy(z, y) + 6 * kl


@pytest.mark.parametrize(("objective", "loss", "passes"), [("at", plain_at, 1), ("trades", plain_trades, 2)])
def test_two_steps_are_those_of_a_proxy_model_in_float64(
    objective: str, loss: Callable[..., torch.Tensor], passes: int
) -> None:
    """The published procedure: a proxy copy descends -L once; its change, rescaled, moves the model."""
    step, (x, y, index, key), asked = make_step(), batch(), shifted(objective, awp.Config(gamma=GAMMA).build())
    for _ in range(2):
        assert step(Batch(x, y, index), key, asked).finite

    model = net().double().train()
    x, x_adv = x.double(), shift(x.double())
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for number in range(2):
        proxy = copy.deepcopy(model)
        optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
        (-loss(proxy, x, x_adv, y)).backward()
        optimizer.step()
        v = {}
        for (name, w), moved in zip(model.named_parameters(), proxy.parameters(), strict=True):
            d = moved.detach() - w.detach()
            kernel = name in ("0.weight", "3.weight", "7.weight")
            v[name] = GAMMA * w.detach().norm() * d / (d.norm() + 1e-20) if kernel else torch.zeros_like(d)
        with torch.no_grad():
            for name, w in model.named_parameters():
                w += v[name]
        gradients = torch.autograd.grad(loss(model, x, x_adv, y), list(model.parameters()))
        with torch.no_grad():
            for (name, w), g in zip(model.named_parameters(), gradients, strict=True):
                g = g + DECAY * w  # at w + v
                momentum[name] = MOMENTUM * momentum[name] + g if number else g
                w -= LR * momentum[name] + v[name]
    for (name, ours), theirs in zip(step.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-4, atol=2e-5, msg=name)
        if name.endswith("num_batches_tracked"):
            assert ours == 2 * passes  # the pass that finds v moves no statistics


def state_of(step: Step) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in step.model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
def test_a_step_that_is_not_finite_leaves_the_weights_exactly(objective: str) -> None:
    step, (x, y, index, key), asked = make_step(), batch(), shifted(objective, awp.Config().build())
    assert step(Batch(x, y, index), key, asked).finite
    before = state_of(step)
    momentum = [s["momentum_buffer"].clone() for s in step.optimizer.state.values()]
    poisoned = x.clone()
    poisoned[0, 0, 0, 0] = math.nan
    assert not step(Batch(poisoned, y, index), key, asked).finite
    for name, value in state_of(step).items():
        assert torch.equal(value, before[name]), name
    for kept, state in zip(momentum, step.optimizer.state.values(), strict=True):
        assert torch.equal(kept, state["momentum_buffer"])
    assert step(Batch(x, y, index), key, asked).finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_breaks_at_the_perturbed_weights_is_undone(value: float) -> None:
    """v was found and added, then the step is left out: w + v - v is w to a rounding."""
    step, (x, y, index, key), calls = make_step(), batch(), []

    class Breaks(AT):
        def outer(self, *arguments: Any) -> torch.Tensor:
            calls.append(0)
            return super().outer(*arguments) * (value if len(calls) == 2 else 1.0)

    before = state_of(step)
    assert not step(Batch(x, y, index), key, shifted(Breaks(), awp.Config(gamma=0.5).build())).finite
    assert len(calls) == 2
    for name, after in state_of(step).items():
        torch.testing.assert_close(after, before[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_gradient_that_is_not_finite_perturbs_nothing() -> None:
    model, (x, y, *_) = net(), batch()
    before = [w.detach().clone() for w in model.parameters()]
    with awp.Config().build()(model, lambda: plain_at(model, x, x, y) * math.inf):
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_error_in_the_block_restores_too() -> None:
    model, (x, y, *_) = net(), batch()
    before = model[0].weight.detach().clone()  # type: ignore[union-attr, operator]

    def fail() -> None:
        with awp.Config(gamma=0.5).build()(model, lambda: plain_at(model, x, x, y)):
            assert not torch.allclose(before, model[0].weight)  # type: ignore[union-attr, arg-type]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    torch.testing.assert_close(model[0].weight.detach(), before)  # type: ignore[union-attr, operator]


def test_the_warm_up_has_none() -> None:
    perturb = awp.Config(warmup_epochs=2).build()
    assert [type(perturb.in_epoch(epoch)) for epoch in (1, 2, 3)] == [none.Nothing, none.Nothing, awp.AWP]
    assert awp.Config().build().in_epoch(1) is not None
    assert isinstance(awp.Config().build().in_epoch(1), awp.AWP)


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 1.0}, {"gamma": -0.1}, {"warmup_epochs": -1}])
def test_settings_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        awp.Config(**options)
