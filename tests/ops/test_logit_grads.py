"""Closed-form logit gradients: against float64 autograd and differences of formulas written down separately."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import ce_grad, cw_grad, dlr_grad, force_reference, kl_grad

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(params=["dispatched", "reference"], autouse=True)
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with force_reference(request.param == "reference"):
        yield


def gap(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """z_y - max_{j != y} z_j, by sorting out the other classes."""
    rows = []
    for row, label in zip(z, y.tolist(), strict=True):
        rows.append(row[label] - torch.cat([row[:label], row[label + 1 :]]).max())
    return torch.stack(rows)


def ce(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def cw(confidence: float) -> Loss:
    return lambda z, y: -torch.relu(gap(z, y) + confidence).sum()


def dlr(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    top = z.topk(3, 1).values
    return -(gap(z, y) / (top[:, 0] - top[:, 2] + 1e-12)).sum()


CASES: list[tuple[str, Loss, Any]] = [
    ("ce", ce, ce_grad),
    ("cw", cw(50.0), cw_grad),
    ("cw inactive", cw(1.0), lambda z, y: cw_grad(z, y, 1.0)),
    ("dlr", dlr, dlr_grad),
]


def case(classes: int = 10, batch: int = 40, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    return scale * torch.randn(batch, classes, dtype=torch.float64), torch.randint(classes, (batch,))


@pytest.mark.parametrize(("loss", "grad"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_equals_autograd(loss: Loss, grad: Any, classes: int) -> None:
    z, y = case(classes)
    z.requires_grad_()
    expected = torch.autograd.grad(loss(z, y), z)[0]
    torch.testing.assert_close(grad(z, y), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad(z.float(), y), expected.float(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("loss", "grad"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_equals_finite_differences(loss: Loss, grad: Any) -> None:
    z, y = case(5, 6)
    h = 1e-6
    expected = torch.zeros_like(z)
    for i in range(z.numel()):
        d = torch.zeros(z.numel(), dtype=z.dtype)
        d[i] = h
        step = d.view(z.shape)
        expected.view(-1)[i] = (loss(z + step, y) - loss(z - step, y)) / (2 * h)
    torch.testing.assert_close(grad(z, y), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_kl_equals_autograd(classes: int) -> None:
    z, _ = case(classes)
    target, _ = case(classes)
    z.requires_grad_()
    loss = F.kl_div(torch.log_softmax(z, 1), torch.softmax(target, 1), reduction="sum")
    expected = torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(kl_grad(z, target), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(kl_grad(z.float(), target.float()), expected.float(), rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(classes=st.integers(3, 40), scale=st.sampled_from([1e-2, 1.0, 60.0]), number=st.integers(0, 2**31))
def test_invariances(classes: int, scale: float, number: int) -> None:
    """Losses that do not see a shift of the logits have gradients that sum to 0; KL's is antisymmetric."""
    torch.manual_seed(number)
    z, y = case(classes, 7, scale)
    other, _ = case(classes, 7, scale)
    for f in (ce_grad, dlr_grad, cw_grad, lambda a, _: kl_grad(a, other)):
        g = f(z, y)
        assert (g.sum(1).abs() <= 1e-14 * (1 + g.abs().amax(1))).all()
    torch.testing.assert_close(kl_grad(z, other), -kl_grad(other, z), rtol=0, atol=1e-15)
    assert (kl_grad(z, z) == 0).all()
    # DLR does not see the logits' scale either, so it has no slope along them
    assert ((dlr_grad(z, y) * z).sum(1).abs() < 1e-6).all()
    assert (ce_grad(z, y).abs() <= 1).all()


def test_cw_by_hand() -> None:
    """z = (2, 1, 0), y = 0, confidence 50: loss -51, and its slope."""
    z, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    assert cw(50.0)(z, y).item() == -51
    assert cw_grad(z, y).tolist() == [[-1, 1, 0]]
    assert cw_grad(z, torch.tensor([2])).tolist() == [[1, 0, -1]]


def test_cw_activity_and_ties() -> None:
    z = torch.tensor([[1.0, 3.0, 0.0], [1.0, 3.0, 0.0], [2.0, 2.0, 2.0], [0.0, 5.0, 5.0]])
    y = torch.tensor([0, 0, 0, 0])
    assert cw_grad(z, y, 2.0).tolist() == [[0, 0, 0], [0, 0, 0], [-1, 1, 0], [0, 0, 0]]  # at exactly 0: 0
    assert cw_grad(z, y, 2.5).tolist() == [[-1, 1, 0], [-1, 1, 0], [-1, 1, 0], [0, 0, 0]]
    assert cw_grad(z, y, 50.0)[3].tolist() == [-1, 1, 0]  # the first of two runners-up
    assert cw_grad(z, y, -1.0)[2].tolist() == [0, 0, 0]


def test_dlr_by_hand() -> None:
    """z = (2, 1, 0, -1), y = 0: DLR -0.5; d/dz of -(z0 - z1) / (z0 - z2) = (-1/4, 1/2, -1/4, 0)."""
    z, y = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0])
    assert dlr(z, y).item() == -0.5
    torch.testing.assert_close(dlr_grad(z, y), torch.tensor([[-0.25, 0.5, -0.25, 0.0]]), rtol=1e-6, atol=0)
    # y = 3: -(z3 - z0) / (z0 - z2) = 3 / 2; the slope: (1/2 - 3/4, 0, 3/4, -1/2)
    torch.testing.assert_close(
        dlr_grad(z, torch.tensor([3])), torch.tensor([[-0.25, 0.0, 0.75, -0.5]]), rtol=1e-6, atol=0
    )


def test_dlr_ties_take_the_first_class() -> None:
    z = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 3.0, 3.0, 2.0]])
    expected = torch.tensor([[0.0, 0.5, -0.5, 0.0], [0.0, -1.0, 1.0, 0.0]])
    torch.testing.assert_close(dlr_grad(z, torch.tensor([0, 1])), expected, rtol=1e-6, atol=1e-7)
    flat = dlr_grad(torch.zeros(1, 4), torch.tensor([0]))
    torch.testing.assert_close(flat, torch.tensor([[-1e12, 1e12, 0.0, 0.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [ce_grad, cw_grad, dlr_grad, lambda z, y: kl_grad(z, z.flip(0))])
def test_half_types_compute_in_float32(grad: Any, dtype: torch.dtype) -> None:
    z, y = case()
    z = z.to(dtype)
    result = grad(z, y)
    assert result.dtype == dtype
    assert torch.equal(result, grad(z.float(), y).to(dtype))


def test_large_logits() -> None:
    z = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 1e4]])
    y = torch.tensor([1, 0])
    assert ce_grad(z, y).tolist() == [[1, -1, 0], [-1, 0.5, 0.5]]
    assert kl_grad(z, z.flip(0)).tolist() == [[1, -0.5, -0.5], [-1, 0.5, 0.5]]
    assert cw_grad(z, y, 0.0).tolist() == [[0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(dlr_grad(z, y)[0], torch.tensor([2.5e-5, -5e-5, 2.5e-5]), rtol=1e-5, atol=0)


def test_excluded_classes() -> None:
    """-inf logits: probability 0; the margin losses are constant or undefined there, never garbage."""
    low = -math.inf
    z = torch.tensor([[0.0, low, 0.0], [low, 0.0, 0.0], [0.0, low, low], [low, low, low]])
    y = torch.zeros(4, dtype=torch.int64)
    nan = [math.nan] * 3
    for actual, expected in (
        (ce_grad(z, y), [[-0.5, 0, 0.5], [-1, 0.5, 0.5], [0, 0, 0], nan]),
        (kl_grad(z, z[:1].expand(4, 3)), [[0, 0, 0], [-0.5, 0.5, 0], [0.5, 0, -0.5], nan]),
        (cw_grad(z, y), [[-1, 0, 1], [0, 0, 0], [-1, 1, 0], nan]),
        (dlr_grad(z, y), [[0, 0, 0], nan, nan, nan]),
    ):
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("grad", [ce_grad, cw_grad, dlr_grad])
def test_nan_fills_its_row_only(grad: Any) -> None:
    z, _ = case(19, 7)
    z[1, 17], z[2, 3] = math.nan, math.inf
    nan = grad(z, torch.tensor([0, 0, 0, -1, 19, 2**62, 18])).isnan()
    assert torch.equal(nan, torch.tensor([False, True, True, True, True, True, False])[:, None].expand(7, 19))


def test_kl_nan_comes_from_either() -> None:
    z, _ = case(19, 4)
    target = z.clone()
    z[1, 2], target[2, 18] = math.nan, math.inf
    nan = kl_grad(z, target).isnan()
    assert torch.equal(nan, torch.tensor([False, True, True, False])[:, None].expand(4, 19))


def test_refusals() -> None:
    z, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for f in (ce_grad, cw_grad, dlr_grad):
        with pytest.raises(ValueError, match=r"\(B, C\)"):
            f(z[0], y)
        with pytest.raises(TypeError, match="int64"):
            f(z, y.int())
        with pytest.raises(TypeError, match="float32"):
            f(z.long(), y)
    for k in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="confidence"):
            cw_grad(z, y, k)
    with pytest.raises(ValueError, match="3 classes"):
        dlr_grad(z[:, :2], y)
    with pytest.raises(ValueError, match="two shapes"):
        kl_grad(z, z[:, :3])
    with pytest.raises(TypeError, match="two types"):
        kl_grad(z, z.double())
    with pytest.raises(ValueError, match="devices"):
        kl_grad(z, z.to("meta"))
