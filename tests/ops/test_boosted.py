"""MART's boosted cross-entropy: its values, its ends, its gradient near them, extreme logits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import boosted_ce, force_reference


@pytest.fixture(params=["dispatched", "reference"], autouse=True)
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with force_reference(request.param == "reference"):
        yield


def plain(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss as MART's paper and code state it, the runner-up taken from a list without the true class."""
    p = torch.softmax(z, 1)
    values = []
    for row, label in zip(p, y.tolist(), strict=True):
        others = torch.cat([row[:label], row[label + 1 :]])
        values.append(-torch.log(row[label]) - torch.log(1.0001 - others.max() + 1e-12))
    return torch.stack(values)


def case(batch: int = 20, classes: int = 10, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    return scale * torch.randn(batch, classes, dtype=torch.float64), torch.randint(classes, (batch,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-8), (torch.float32, 3e-7)])
def test_mart_by_hand(dtype: torch.dtype, tolerance: float) -> None:
    """p' = (.5, .3, .2), y = 0: 1.0496793."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().to(dtype)
    result = boosted_ce(logits, torch.tensor([0]))
    assert result.dtype == dtype
    assert result.item() == pytest.approx(1.0496793, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends(dtype: torch.dtype) -> None:
    """The least value is -9.9995e-5, negative; the margin term is at most 9.2103, at a confident mistake."""
    z = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 1000.0, 0.0]], dtype=dtype)
    least, worst = boosted_ce(z, torch.tensor([0, 0])).tolist()
    assert least == pytest.approx(-9.9995e-5, abs=1e-9 if dtype == torch.float64 else 2e-8)
    # the cross-entropy is 1000 exactly; float32 keeps 6e-5 of the sum
    assert worst - 1000 == pytest.approx(9.2103, abs=1e-4)


def test_margin_term_keeps_its_digits_in_float32() -> None:
    """1.0001 - p_r + 1e-12 loses four digits if p_r is subtracted in float32."""
    z = torch.tensor([[0.0, 20.0], [0.0, 12.0], [0.0, 9.0]])
    y = torch.zeros(3, dtype=torch.int64)
    expected = plain(z.double(), y)
    torch.testing.assert_close(boosted_ce(z, y).double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("scale", [1.0, 15.0])
def test_equals_autograd(classes: int, scale: float) -> None:
    z, y = case(classes=classes, scale=scale)
    z.requires_grad_()
    weights = torch.linspace(-1, 2, len(z), dtype=torch.float64)
    value, expected = boosted_ce(z, y), plain(z, y)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    wanted = torch.autograd.grad(expected, z, weights)[0]
    torch.testing.assert_close(torch.autograd.grad(value, z, weights)[0], wanted, rtol=1e-8, atol=1e-11)
    small = z.detach().float().requires_grad_()
    actual = torch.autograd.grad(boosted_ce(small, y), small, weights.float())[0]
    exact = small.detach().double().requires_grad_()
    wanted = torch.autograd.grad(plain(exact, y), exact, weights)[0]
    torch.testing.assert_close(actual.double(), wanted, rtol=2e-5, atol=1e-6)


def test_gradcheck() -> None:
    z, y = case(5, 4)
    assert torch.autograd.gradcheck(lambda a: boosted_ce(a, y), (z.requires_grad_(),))


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(classes=st.integers(2, 40), scale=st.sampled_from([1e-3, 1.0, 100.0]), number=st.integers(0, 2**31))
def test_bounds_and_invariances(classes: int, scale: float, number: int) -> None:
    torch.manual_seed(number)
    z, y = case(6, classes, scale)
    value = boosted_ce(z, y)
    ce = torch.nn.functional.cross_entropy(z, y, reduction="none")
    assert (value - ce >= -9.9996e-5).all()
    assert (value - ce <= 9.21035).all()
    torch.testing.assert_close(boosted_ce(z + 5, y), value, rtol=1e-9, atol=1e-10)
    z.requires_grad_()
    gradient = torch.autograd.grad(boosted_ce(z, y).sum(), z)[0]
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6).double(), rtol=0, atol=1e-11)


def test_gradient_at_a_tie_goes_to_the_first_class() -> None:
    z = torch.tensor([[0.0, 1.0, 1.0]], requires_grad=True)
    gradient = torch.autograd.grad(boosted_ce(z, torch.tensor([0])).sum(), z)[0][0]
    p = torch.softmax(z.detach()[0].double(), 0)
    w = p[1] / (1.0001 - p[1] + 1e-12)
    expected = torch.stack([p[0] - 1 - w * p[0], p[1] + w * (1 - p[1]), p[2] - w * p[2]])
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-7)


def test_extreme_logits() -> None:
    low = -math.inf
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [low, 0.0, 0.0], [0.0, low, low], [low] * 3])
    value = boosted_ce(z, torch.zeros(5, dtype=torch.int64))
    expected = torch.tensor([-9.9995e-5, 2e4 + 9.2103, math.inf, -9.9995e-5, math.nan])
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=3e-8, equal_nan=True)
    z.requires_grad_()
    g = torch.autograd.grad(boosted_ce(z, torch.zeros(5, dtype=torch.int64)).sum(), z)[0]
    # at a confident mistake the margin term's slope is 1e4 times the other probabilities, which vanish
    torch.testing.assert_close(g[1], torch.tensor([-1.0, 1.0, 0.0]), rtol=0, atol=1e-6)
    assert g[:2].isfinite().all()
    assert g[4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype: torch.dtype) -> None:
    z, y = case()
    z = z.to(dtype).requires_grad_()
    assert torch.equal(boosted_ce(z, y), boosted_ce(z.float(), y))
    assert torch.autograd.grad(boosted_ce(z, y).sum(), z)[0].dtype == dtype


def test_nan_stays_in_its_row() -> None:
    z, _ = case(7, 19)
    z[1, 17], z[2, 3] = math.nan, math.inf
    z.requires_grad_()
    value = boosted_ce(z, torch.tensor([0, 0, 0, -1, 19, 2**62, 18]))
    expected = [False, True, True, True, True, True, False]
    assert value.isnan().tolist() == expected
    assert torch.autograd.grad(value.sum(), z)[0].isnan().any(1).tolist() in (
        expected,  # the op's backward: the row is undefined
        [False, True, True, False, False, False, False],  # autograd of the reference: a constant NaN's slope
    )


def test_refusals() -> None:
    z, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(B, C\)"):
        boosted_ce(z[0], y)
    with pytest.raises(ValueError, match="labels"):
        boosted_ce(z, y[:2])
    with pytest.raises(TypeError, match="int64"):
        boosted_ce(z, y.float())
