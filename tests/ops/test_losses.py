"""KL divergence per sample: TRADES' and MART's values, gradients of both arguments, extreme logits, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import boosted_ce, force_reference, kl_div

FLOORS = [0.0, 1e-12, 1e-3]


@pytest.fixture(params=["dispatched", "reference"], autouse=True)
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with force_reference(request.param == "reference"):
        yield


def rows(*p: tuple[float, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits whose softmaxes are the given rows; 2 is added to each, which changes nothing."""
    return torch.tensor(p, dtype=torch.float64).log().add(2).to(dtype)


def pair(batch: int = 20, classes: int = 10, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(scale * torch.randn(2, batch, classes, dtype=torch.float64))


def plain(zp: torch.Tensor, zq: torch.Tensor, floor: float) -> torch.Tensor:
    return F.kl_div(torch.log(torch.softmax(zq, 1) + floor), torch.softmax(zp, 1), reduction="none").sum(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-8), (torch.float32, 3e-7)])
def test_trades_by_hand(dtype: torch.dtype, tolerance: float) -> None:
    """p = (.7, .2, .1), p' = (.5, .3, .2), y = 0: KL .0851228, and with beta = 6 a total of .8674119."""
    p, q = rows((0.7, 0.2, 0.1), dtype=dtype), rows((0.5, 0.3, 0.2), dtype=dtype)
    kl = kl_div(p, q)
    assert kl.dtype == dtype
    assert kl.item() == pytest.approx(0.0851228, abs=tolerance)
    total = F.cross_entropy(p, torch.tensor([0])) + 6 * kl.mean()
    assert total.item() == pytest.approx(0.8674119, abs=10 * tolerance)


def test_mart_by_hand() -> None:
    """The same p, p', y: the weighted KL .0255369; beta = 5 gives 1.1773636, beta = 6 gives 1.2029004."""
    p, q, y = rows((0.7, 0.2, 0.1)), rows((0.5, 0.3, 0.2)), torch.tensor([0])
    weighted = kl_div(p, q, floor=1e-12) * (1.0000001 - torch.softmax(p, 1)[:, 0])
    assert weighted.item() == pytest.approx(0.0255369, abs=5e-8)
    for beta, total in ((5, 1.1773636), (6, 1.2029004)):
        assert (boosted_ce(q, y) + beta * weighted).item() == pytest.approx(total, abs=5e-8)


def test_squeeze_pair_by_hand() -> None:
    p, q = rows((0.7, 0.3)), rows((0.5, 0.5))
    assert kl_div(p, q).item() == pytest.approx(0.0822829, abs=5e-8)
    assert kl_div(q, p).item() == pytest.approx(0.0871767, abs=5e-8)


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_equals_autograd(classes: int, floor: float) -> None:
    p, q = (z.requires_grad_() for z in pair(classes=classes))
    weights = torch.linspace(-1, 2, len(p), dtype=torch.float64)
    value, expected = kl_div(p, q, floor), plain(p, q, floor)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(value, (p, q), weights), torch.autograd.grad(expected, (p, q), weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("floor", FLOORS)
def test_gradcheck(floor: float) -> None:
    p, q = (z.requires_grad_() for z in pair(4, 5))
    assert torch.autograd.gradcheck(lambda a, b: kl_div(a, b, floor), (p, q))
    assert torch.autograd.gradcheck(lambda b: kl_div(p.detach(), b, floor), (q,))
    assert torch.autograd.gradcheck(lambda a: kl_div(a, q.detach(), floor), (p,))


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(classes=st.integers(2, 40), scale=st.sampled_from([1e-3, 1.0, 60.0]), number=st.integers(0, 2**31))
def test_invariances(classes: int, scale: float, number: int) -> None:
    torch.manual_seed(number)
    p, q = pair(6, classes, scale)
    value = kl_div(p, q)
    assert (value >= -1e-14 * (1 + scale)).all()
    torch.testing.assert_close(kl_div(p + 7, q - 3), value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(kl_div(p, p), torch.zeros(6, dtype=torch.float64), rtol=0, atol=0)
    order = torch.randperm(classes)
    torch.testing.assert_close(kl_div(p[:, order], q[:, order]), value, rtol=1e-9, atol=1e-12)
    # the gradients do not see a shift either
    p.requires_grad_(), q.requires_grad_()
    for g in torch.autograd.grad(kl_div(p, q, 1e-12).sum(), (p, q)):
        torch.testing.assert_close(g.sum(1), torch.zeros(6).double(), rtol=0, atol=1e-12 * (1 + scale))


def test_peaked_distributions_keep_their_gradient() -> None:
    """KL is some 80 here while its slope in the logits of p is far below: the op's float32 must not drown it."""
    p, q = torch.tensor([[50.0, 38.0, -30.0]]), torch.tensor([[-30.0, 10.0, 50.0]])
    exact = [z.double().requires_grad_() for z in (p, q)]
    expected = torch.autograd.grad(plain(*exact, 0.0).sum(), exact)
    p.requires_grad_(), q.requires_grad_()
    with force_reference(False):
        result = torch.autograd.grad(kl_div(p, q).sum(), (p, q))
    for actual, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-9)


def test_large_logits_and_zero_probabilities() -> None:
    low = -math.inf
    p = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, low], [0.0, 0.0, low], [0.0, 0.0, 0.0]])
    q = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [0.0, 0.0, low], [0.0, 0.0, low]])
    expected = torch.tensor([0.0, math.log(1.5), 0.0, math.inf])
    torch.testing.assert_close(kl_div(p, q), expected, rtol=1e-6, atol=1e-7)
    expected[3] = 2 / 3 * math.log(2 / 3) + (math.log(1 / 3) - math.log(1e-12)) / 3
    torch.testing.assert_close(kl_div(p, q, 1e-12), expected, rtol=1e-6, atol=1e-7)
    p.requires_grad_(), q.requires_grad_()
    for g in torch.autograd.grad(kl_div(p, q, 1e-12).sum(), (p, q)):
        assert g.isfinite().all()
    by_p, by_q = torch.autograd.grad(kl_div(p, q).sum(), (p, q))
    assert by_q.isfinite().all()
    assert by_p[:3].isfinite().all()


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype: torch.dtype, floor: float) -> None:
    p, q = (z.to(dtype) for z in pair())
    assert kl_div(p, q, floor).dtype == torch.float32
    assert torch.equal(kl_div(p, q, floor), kl_div(p.float(), q.float(), floor))
    p.requires_grad_(), q.requires_grad_()
    for g in torch.autograd.grad(kl_div(p, q, floor).sum(), (p, q)):
        assert g.dtype == dtype


def test_expanded_incoming_gradient() -> None:
    p, q = (z.requires_grad_() for z in pair())
    by_sum = torch.autograd.grad(kl_div(p, q).sum(), (p, q))
    by_ones = torch.autograd.grad(kl_div(p, q), (p, q), torch.ones(20, dtype=torch.float64))
    for a, b in zip(by_sum, by_ones, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_nan_comes_from_either_and_stays_in_its_row() -> None:
    p, q = pair(5, 19)
    p[1, 2], q[2, 18], q[3, 0] = math.nan, math.inf, math.nan
    p.requires_grad_(), q.requires_grad_()
    value = kl_div(p, q)
    assert value.isnan().tolist() == [False, True, True, True, False]
    for g in torch.autograd.grad(value.sum(), (p, q)):
        assert g.isnan().any(1).tolist() == [False, True, True, True, False]


def test_refusals() -> None:
    z = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"\(B, C\)"):
        kl_div(z[0], z[0])
    with pytest.raises(ValueError, match="two shapes"):
        kl_div(z, z[:2])
    with pytest.raises(TypeError, match="two types"):
        kl_div(z, z.half())
    with pytest.raises(TypeError, match="float32"):
        kl_div(z.long(), z.long())
    with pytest.raises(ValueError, match="devices"):
        kl_div(z, z.to("meta"))
    for floor in (-1e-12, 1e-40, math.nan, math.inf):
        with pytest.raises(ValueError, match="floor"):
            kl_div(z, z, floor)
