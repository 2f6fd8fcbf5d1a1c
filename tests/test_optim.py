"""The optimiser's learning rate as a tensor, its momentum, the average of the weights, statistics put back."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mwpb_fast.config import OptimConfig
from mwpb_fast.engine.rollback import Rollback
from mwpb_fast.optim import Average, learning_rate, make_optimizer, set_learning_rate

CONFIG = OptimConfig(lr=0.1, drops=(2, 4))


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 4))


def gradients(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_a_learning_rate_in_a_tensor_gives_the_same_bits_as_a_number() -> None:
    """Through drops, against PyTorch's optimisers with a number: fused to the bit, plain to rounding."""
    ours, fused, plain = small(), small(), small()
    optimizer = make_optimizer(ours, CONFIG)
    arguments = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)
    others = [
        torch.optim.SGD(fused.parameters(), fused=True, **arguments),  # type: ignore[arg-type]
        torch.optim.SGD(plain.parameters(), **arguments),  # type: ignore[arg-type]
    ]
    for epoch in range(1, 6):
        rate = learning_rate(CONFIG, epoch)
        set_learning_rate(optimizer, rate)
        for other in others:
            other.param_groups[0]["lr"] = rate
        for model in (ours, fused, plain):
            gradients(model, epoch)
        for o in (optimizer, *others):
            o.step()
        for a, b, c in zip(ours.parameters(), fused.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_stays_one_tensor() -> None:
    optimizer = make_optimizer(small(), CONFIG)
    (group,) = optimizer.param_groups
    rate = group["lr"]
    set_learning_rate(optimizer, 0.025)
    assert group["lr"] is rate
    assert rate.item() == pytest.approx(0.025)
    optimizer.load_state_dict(
        optimizer.state_dict() | {"param_groups": [{**group, "lr": 0.5, "params": list(range(6))}]}
    )
    set_learning_rate(optimizer, 0.01)  # a number, as in a checkpoint from elsewhere
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.01)
    number = torch.optim.SGD(small().parameters(), lr=1.0)
    set_learning_rate(number, 0.01)
    assert number.param_groups[0]["lr"] == 0.01


def test_the_optimisers_state_goes_through_a_checkpoint() -> None:
    one, other = small(), small()
    first, second = make_optimizer(one, CONFIG), make_optimizer(other, CONFIG)
    gradients(one, 0)
    first.step()
    buffer = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "model": one.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    second.load_state_dict(state["optimizer"])
    other.load_state_dict(state["model"])
    for model, optimizer in ((one, first), (other, second)):
        gradients(model, 1)
        optimizer.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_first_step_that_is_left_out_leaves_no_garbage_in_the_momentum(poisoned_memory: None) -> None:
    model = small()
    optimizer, before = make_optimizer(model, CONFIG), copy.deepcopy(model)
    gradients(model, 0)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old)
        assert not optimizer.state[p]["momentum_buffer"].any()


def test_the_average_is_pytorchs() -> None:
    model = small()
    ours = Average(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for number in range(4):
        with torch.no_grad():
            for t in (*model.parameters(), model[1].running_mean, model[1].running_var):  # type: ignore[index]
                t.add_(torch.randn(t.shape))
        model[1].num_batches_tracked += 1  # type: ignore[index, operator]
        ours.update()
        ours.count()
        theirs.update_parameters(model)
        expected = theirs.module.state_dict()
        for name, value in ours.module.state_dict().items():
            if value.is_floating_point():
                assert torch.equal(value, expected[name]), name
            else:
                assert value == number + 1  # a count is not averaged
    assert ours.steps == 4


@pytest.mark.parametrize("finite", [True, False])
def test_the_guard_puts_back_what_was(finite: bool) -> None:
    tensors = [torch.rand(3), torch.rand(2, 2).t(), torch.rand(4, dtype=torch.float64), torch.rand(())]
    rollback = Rollback(tensors)
    before = [t.clone() for t in tensors]
    rollback.save()
    for t in tensors:
        t.fill_(math.nan if not finite else 7)
    rollback.put_back(torch.tensor(finite))
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t, old) if not finite else (t == 7).all()


def test_the_guard_of_nothing() -> None:
    rollback = Rollback([])
    rollback.save()
    rollback.put_back(torch.tensor(False))
