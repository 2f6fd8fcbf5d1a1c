"""The objectives against the hand-computed values of their equations and against float64 autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mwpb_fast.config import load
from mwpb_fast.objectives import at, mart, trades

P = (0.7, 0.2, 0.1)
P_ADV = (0.5, 0.3, 0.2)


class Table(torch.nn.Module):
    """A model that answers with the rows that its input is made of: x are the logits themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def log(p: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([p]).log()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (at.Config().build(), -math.log(0.5)),
        (trades.Config(beta=6.0).build(), 0.8674119),
        (trades.Config(beta=0.0).build(), -math.log(0.7)),
        (mart.Config(beta=5.0).build(), 1.1773636),
        (mart.Config(beta=6.0).build(), 1.2029004),
        (mart.Config(beta=0.0).build(), 1.0496793),
    ],
)
def test_outer_loss_has_the_hand_computed_value(objective: Any, expected: float) -> None:
    loss = objective.outer(Table(), log(P), log(P_ADV), torch.tensor([0]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=2e-6)


def test_the_loss_is_a_mean_over_the_batch() -> None:
    for name in ("at", "trades", "mart"):
        objective = load("objectives", name).Config().build()
        one = objective.outer(Table(), log(P), log(P_ADV), torch.tensor([0]))
        three = objective.outer(
            Table(), log(P).expand(3, 3), log(P_ADV).expand(3, 3), torch.zeros(3, dtype=torch.int64)
        )
        assert three.item() == pytest.approx(one.item(), rel=1e-6)


def plain_at(z: torch.Tensor, a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -a.log_softmax(1)[torch.arange(len(y)), y].mean()


def plain_trades(z: torch.Tensor, a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p, q = z.softmax(1), a.softmax(1)
    return plain_at(z, z, y) + 6 * (p * (p.log() - q.log())).sum() / len(y)


def plain_mart(z: torch.Tensor, a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p, q = z.softmax(1), a.softmax(1)
    rows = torch.arange(len(y))
    others = q.clone()
    others[rows, y] = -1
    boosted = -q[rows, y].log() - (1.0001 - others.max(1).values + 1e-12).log()
    weighted = (p * (p.log() - (q + 1e-12).log())).sum(1) * (1.0000001 - p[rows, y])
    return boosted.mean() + 5 * weighted.mean()


@pytest.mark.parametrize(("name", "plain"), [("at", plain_at), ("trades", plain_trades), ("mart", plain_mart)])
def test_gradients_flow_through_both_passes_as_in_the_equations(name: str, plain: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    z = (3 * torch.randn(17, 10, generator=generator)).double().requires_grad_()
    a = (3 * torch.randn(17, 10, generator=generator)).double().requires_grad_()
    y = torch.randint(10, (17,), generator=generator)
    expected = torch.autograd.grad(plain(z, a, y), (z, a), allow_unused=True)

    z32, a32 = z.detach().float().requires_grad_(), a.detach().float().requires_grad_()
    loss = load("objectives", name).Config().build().outer(Table(), z32, a32, y)
    actual = torch.autograd.grad(loss, (z32, a32), allow_unused=True)
    assert loss.item() == pytest.approx(plain(z, a, y).item(), rel=1e-5)
    for want, got in zip(expected, actual, strict=True):
        assert (want is None) == (got is None)
        if want is not None and got is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_inner_gradients_are_those_of_the_summed_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    clean, logits = torch.randn(5, 10, generator=generator), torch.randn(5, 10, generator=generator)
    y = torch.randint(10, (5,), generator=generator)
    for name, loss in (
        ("at", lambda z: torch.nn.functional.cross_entropy(z, y, reduction="sum")),
        ("mart", lambda z: torch.nn.functional.cross_entropy(z, y, reduction="sum")),
        ("trades", lambda z: torch.nn.functional.kl_div(z.log_softmax(1), clean.softmax(1), reduction="sum")),
    ):
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        actual = load("objectives", name).Config().build().inner(logits, clean, y)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_trades_has_no_inner_gradient_at_the_natural_image() -> None:
    z = torch.randn(4, 10)
    gradient = trades.Config().build().inner(z, z.clone(), torch.zeros(4, dtype=torch.int64))
    assert (gradient == 0).all()


@pytest.mark.parametrize("module", [trades, mart])
def test_a_negative_beta_is_refused(module: Any) -> None:
    with pytest.raises(ValueError, match="beta"):
        module.Config(beta=-1.0)
