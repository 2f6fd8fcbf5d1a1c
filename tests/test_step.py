"""The step: Algorithm 1 against a plain re-derivation, its guard, and the modes that it must restore."""

from __future__ import annotations

import math
from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from method_cases import Crafted, method

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import fixed, margin
from mwpb_fast.config import OptimConfig, PrecisionConfig
from mwpb_fast.engine.net import EagerNet, module_mode, untracked
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch
from mwpb_fast.models import build_model
from mwpb_fast.optim import learning_rate, make_optimizer
from mwpb_fast.step import Step

PGD = pgd.Config(steps=3).build()
FIXED = fixed.Config().build()
CPU = make_precision(PrecisionConfig(device="cpu"))
EPS = 8 / 255


def make_step(**options: Any) -> Step:
    torch.manual_seed(5)
    model = build_model("smallresnet-8", num_classes=10, channels=3)
    return Step(
        model=model,
        net=EagerNet(model, CPU),
        optimizer=make_optimizer(model, OptimConfig(lr=0.1)),
        precision=CPU,
        **options,
    )


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(n, 3, 8, 8, generator=generator)
    y = torch.randint(10, (n,), generator=generator)
    return x, y, torch.arange(100, 100 + n), torch.tensor([ops.derive_seed(1, 2)])


def test_the_step_is_algorithm_1() -> None:
    """Every line written out once more in plain PyTorch, in float64 where the radius is made."""
    step, (x, y, index, key) = make_step(), batch()
    model = make_step().model
    result = step(Batch(x, y, index), key, method("at", attack=PGD, budget=margin.Config(alpha=0.58).build()))

    model.eval()
    p = model(x).double().softmax(1)
    own = p[torch.arange(8), y]
    others = p.clone()
    others[torch.arange(8), y] = -1
    radius = (torch.exp(0.58 * (own - others.max(1).values)) * EPS).detach()
    torch.testing.assert_close(result.radius.double(), radius, rtol=1e-5, atol=0)
    r = result.radius.view(-1, 1, 1, 1)
    x_adv = ops.gaussian_start(x, 0.001, key, index)
    for _ in range(3):
        leaf = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        moved = x_adv + r / 4 * gradient.sign()
        x_adv = torch.minimum(torch.maximum(moved, x - r), x + r).clamp(0, 1)
    model.train()
    loss = torch.nn.functional.cross_entropy(model(x_adv), y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loss.backward()
    optimizer.step()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    for (name, ours), theirs in zip(step.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
@pytest.mark.parametrize("alpha", [0.0, 0.58])
def test_radii_lie_in_the_reachable_interval(objective: str, alpha: float) -> None:
    *images, key = batch(32)
    asked = method(objective, attack=PGD, budget=margin.Config(alpha=alpha).build())
    radius = make_step()(Batch(*images), key, asked).radius
    assert radius.min() >= math.exp(-alpha) * EPS * (1 - 1e-6)
    assert radius.max() <= math.exp(alpha) * EPS * (1 + 1e-6)
    if alpha == 0:
        assert (radius == torch.tensor(EPS)).all()


@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
def test_a_step_that_is_not_finite_leaves_the_model_alone(objective: str) -> None:
    step, (x, y, index, key), asked = make_step(), batch(), method(objective, attack=PGD, budget=FIXED)
    assert step(Batch(x, y, index), key, asked).finite
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    momentum = [s["momentum_buffer"].clone() for s in step.optimizer.state.values()]
    poisoned = x.clone()
    poisoned[3, 1, 2, 2] = math.nan
    result = step(Batch(poisoned, y, index), key, asked)
    assert not result.finite
    for name, value in step.model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, before[name]), name
    for kept, state in zip(momentum, step.optimizer.state.values(), strict=True):
        assert torch.equal(kept, state["momentum_buffer"])
    assert step(Batch(x, y, index), key, asked).finite


def test_a_finite_loss_with_an_infinite_gradient_leaves_the_weights_alone() -> None:
    step, (*images, key) = make_step(), batch()
    weight = next(step.model.parameters())
    weight.register_hook(lambda g: g * math.inf)
    before = weight.detach().clone()
    result = step(Batch(*images), key, method(attack=PGD, budget=FIXED))
    assert torch.isfinite(result.loss)
    assert not result.finite
    assert torch.equal(weight, before)


def test_the_attack_runs_in_eval_mode_and_leaves_no_gradient_behind() -> None:
    seen: list[bool] = []
    step, (*images, key) = make_step(), batch()
    handle = step.model.register_forward_hook(lambda m, i, o: seen.append(m.training))
    step(Batch(*images), key, method("trades", attack=PGD))
    handle.remove()
    assert seen == [False] + [False] * 3 + [True, True]  # margin, three attack steps, natural and adversarial


def test_train_mode_attacks_are_a_switch() -> None:
    seen: list[bool] = []
    step, (*images, key) = make_step(attack_mode="train"), batch()
    step.model.register_forward_hook(lambda m, i, o: seen.append(m.training))
    step(Batch(*images), key, method(attack=PGD, budget=FIXED))
    assert seen == [True] * 3 + [True]  # AT with a fixed budget needs no clean forward


def running_statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    return [b.clone() for b in model.buffers()]


def test_batch_mode_attacks_use_batch_statistics_and_move_none() -> None:
    """One update of the running statistics a step, the outer pass's; in train mode three more."""
    seen: list[bool] = []
    step, (*images, key) = make_step(attack_mode="batch"), batch()
    step.model.register_forward_hook(lambda m, i, o: seen.append(m.training))
    step(Batch(*images), key, method(attack=PGD, budget=FIXED))
    assert seen == [True] * 3 + [True]
    counts = [b.item() for b in step.model.buffers() if b.dtype == torch.int64]
    assert set(counts) == {1}
    assert all(m.track_running_stats for m in step.model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_untracked_restores_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2, track_running_stats=False))
    before = running_statistics(model)

    def fail() -> None:
        with untracked(model):
            model(torch.randn(4, 2))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [m.track_running_stats for m in model] == [True, False]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, running_statistics(model), strict=True))


def test_pgd_counts_the_iterates_that_are_still_right() -> None:
    """Before each of the K steps, so with the start and without the last point."""
    x, _, index, key = batch()
    net = EagerNet(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), CPU)
    attack = pgd.Config(steps=4, count_correct=True).build()
    seen: list[torch.Tensor] = []

    def inner(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        seen.append(logits.argmax(1) == y)
        return ops.ce_grad(logits, y)

    y = net.logits(x).argmax(1)  # right at the start, so that there is something to lose
    notes: dict[str, torch.Tensor] = {}
    x_adv = attack(net, Batch(x, y, index), None, torch.full((8,), 0.1), inner, key, notes)
    assert len(seen) == 4
    assert torch.equal(notes["hits"], torch.stack(seen).float().sum(0) / 4)
    assert 0 < notes["hits"].sum() < 8
    plain = pgd.Config(steps=4).build()
    assert torch.equal(plain(net, Batch(x, y, index), None, torch.full((8,), 0.1), inner, key, notes), x_adv)


def test_the_step_reports_the_radii_that_the_attack_found() -> None:
    step, (*images, key) = make_step(), batch()
    found = torch.arange(8) / 255

    def attack(net: Any, batch: Batch, *rest: Any) -> torch.Tensor:
        rest[-1]["radius"] = found
        return batch.x

    assert step(Batch(*images), key, method(attack=Crafted(attack))).radius is found


def test_module_mode_restores_every_module() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    model[0].eval()

    def fail() -> None:
        with module_mode(model, training=False):
            assert not any(m.training for m in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [m.training for m in model.modules()] == [True, False, True]


def test_noise_depends_on_seed_epoch_and_sample_alone() -> None:
    x, _, index, key = batch()
    start = pgd.Config(steps=0).build()
    one = start.start(x, torch.full((8,), EPS), key, index)
    order = torch.randperm(8)
    shuffled = start.start(x[order], torch.full((8,), EPS), key, index[order])
    assert torch.equal(one[order], shuffled)
    other = start.start(x, torch.full((8,), EPS), torch.tensor([ops.derive_seed(1, 3)]), index)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(1, 0.1), (79, 0.1), (80, 0.01), (89, 0.01), (90, 0.001), (110, 0.001)]
)
def test_the_learning_rate_drops_in_the_named_epochs(epoch: int, expected: float) -> None:
    assert learning_rate(OptimConfig(), epoch) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_an_optimizer_that_cannot_leave_a_step_out_is_refused(name: str) -> None:
    model = build_model("smallresnet-4", num_classes=10, channels=3)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"optimizer {name} cannot leave a step out.*with fused=True"):
        Step(model=model, net=EagerNet(model, CPU), optimizer=optimizer, precision=CPU)
    Step(
        model=model,
        net=EagerNet(model, CPU),
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        precision=CPU,
    )
