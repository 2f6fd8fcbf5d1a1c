"""Probability margin and radii: the paper's values, bounds, invariances, extreme logits, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from cases import RUNNERS, outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import deviation_radius, force_reference, margin, margin_radius, standardised_radius
from mwpb_kernels.margin import DEVIATION_RADIUS, MARGIN_RADIUS

EPS = 8 / 255
RADII = (margin_radius, deviation_radius, standardised_radius)


@pytest.fixture(params=["dispatched", "reference"], autouse=True)
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with force_reference(request.param == "reference"):
        yield


def logits_of(*p: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """One row of logits whose softmax is p; 3 is added to each, which changes nothing."""
    return torch.tensor([p], dtype=torch.float64).log().add(3).to(dtype)


def label(y: int) -> torch.Tensor:
    return torch.tensor([y])


def logits_and_labels(batch: int = 64, classes: int = 10, scale: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    return scale * torch.randn(batch, classes), torch.randint(classes, (batch,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("y", "m"), [(0, 0.5), (1, -0.5), (2, -0.6)])
def test_margin_of_known_probabilities(y: int, m: float, dtype: torch.dtype) -> None:
    result = margin(logits_of(0.7, 0.2, 0.1, dtype=dtype), label(y))
    assert result.dtype == dtype
    assert result.item() == pytest.approx(m, abs=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(("y", "radius", "step"), [(0, 0.041927, 0.010482), (1, 0.023475, 0.005869)])
def test_radius_of_known_probabilities(y: int, radius: float, step: float) -> None:
    result = margin_radius(logits_of(0.7, 0.2, 0.1), label(y), EPS, 0.58).item()
    assert result == pytest.approx(radius, abs=5e-7)
    assert result / 4 == pytest.approx(step, abs=5e-7)
    assert result * 255 == pytest.approx({0: 10.691, 1: 5.986}[y], abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_margin_gives_the_base_radius_exactly(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.5, 1.5, -2.0], [0.0, 0.0, 0.0]], dtype=dtype)
    result = margin_radius(logits, torch.tensor([0, 2]), EPS, 0.58)
    assert torch.equal(result, torch.full_like(result, EPS))


@pytest.mark.parametrize(
    ("alpha", "low", "high"),
    [
        (0.58, 0.01757, 0.05603),
        (0.42, 0.02061, 0.04775),
        (0.55, 0.01810, 0.05438),
        (0.40, 0.02103, 0.04680),
        (0.70, 0.01558, 0.06318),
        (0.50, 0.01903, 0.05172),
        (0.15, 0.02700, 0.03645),
        (0.60, 0.01722, 0.05716),
    ],
)
def test_reachable_interval(alpha: float, low: float, high: float) -> None:
    certain = torch.tensor([[100.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    result = margin_radius(certain, torch.tensor([1, 0]), EPS, alpha)
    torch.testing.assert_close(result, torch.tensor([low, high]), rtol=0, atol=5.1e-6)


def test_two_classes() -> None:
    logits, labels = logits_and_labels(classes=2)
    own = torch.softmax(logits.double(), 1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(margin(logits, labels).double(), 2 * own - 1, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(classes=st.integers(2, 40), scale=st.sampled_from([1e-3, 1.0, 50.0, 1e4]), number=st.integers(0, 2**31))
def test_bounds_and_invariances(classes: int, scale: float, number: int) -> None:
    torch.manual_seed(number)
    logits, labels = logits_and_labels(9, classes, scale)
    m = margin(logits, labels)
    assert (m.abs() <= 1 + 1e-6).all()
    # positive where the label has the largest logit, negative where another has
    own = logits.gather(1, labels[:, None]).squeeze(1)
    assert (m[own == logits.amax(1)] >= 0).all()
    assert (m[own < logits.amax(1)] <= 0).all()
    radius = margin_radius(logits, labels, EPS, 0.58)
    torch.testing.assert_close(radius, torch.exp(0.58 * m) * EPS, rtol=1e-6, atol=0)
    assert (radius >= math.exp(-0.58) * EPS * (1 - 1e-6)).all()
    assert (radius <= math.exp(0.58) * EPS * (1 + 1e-6)).all()
    order = torch.randperm(classes)
    torch.testing.assert_close(margin(logits[:, order], order.argsort()[labels]), m, rtol=1e-5, atol=1e-6)


def test_large_logits_are_stable() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, 1e4, 0.0], [-1e4, -1e4, -1e4 + 1]])
    result = margin(logits, torch.tensor([0, 1, 2]))
    p = 1 / (1 + 2 * math.exp(-1))
    torch.testing.assert_close(result, torch.tensor([1.0, 0.0, p - (1 - p) / 2]), rtol=0, atol=1e-6)


def test_excluded_classes() -> None:
    """-inf means probability 0, be it the true class, the runner-up or all the others."""
    low = -math.inf
    logits = torch.tensor([[0.0, low, low], [low, 0.0, 0.0], [0.0, 0.0, low], [low, low, low]])
    result = margin(logits, torch.tensor([0, 0, 2, 0]))
    torch.testing.assert_close(result, torch.tensor([1.0, -0.5, -0.5, math.nan]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("f", [margin, *(partial(f, eps=1, alpha=1) for f in RADII)])
def test_nan_stays_in_its_row(f: Callable[..., torch.Tensor]) -> None:
    logits, _ = logits_and_labels(7, 19, 1.0)
    logits[1, 17] = math.nan
    logits[2, 3] = math.inf
    labels = torch.tensor([0, 0, 0, -1, 19, 2**62, 18])
    assert f(logits, labels).isnan().tolist() == [False, True, True, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_compute_in_float32(dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels()
    logits = logits.to(dtype)
    assert margin(logits, labels).dtype == torch.float32
    torch.testing.assert_close(margin(logits, labels), margin(logits.float(), labels), rtol=0, atol=0)


def test_gradient_at_a_tie_goes_to_the_first_class() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]], requires_grad=True)
    margin(logits, torch.tensor([0, 1])).sum().backward()
    p = torch.softmax(logits.detach()[0], 0)
    assert logits.grad is not None
    first = torch.stack([p[0] - p[0] * (p[0] - p[1]), -p[1] - p[1] * (p[0] - p[1]), -p[2] * (p[0] - p[1])])
    torch.testing.assert_close(logits.grad[0], first)
    torch.testing.assert_close(logits.grad[1], torch.stack([torch.zeros(()), p[1], -p[2]]))


def test_radii_carry_no_gradient() -> None:
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    for radius in RADII:
        assert not radius(logits, labels, EPS, 0.5).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("y", "margin_of", "deviation", "by_margin", "by_deviation"),
    [
        (0, 0.5, 0.5522681, 0.0402048, 0.0413126),
        (1, -0.5, 0.3605551, 0.0239026, 0.0373927),
        (2, -0.6, 0.4301163, 0.0226914, 0.0387700),
    ],
)
def test_radii_as_released(
    y: int, margin_of: float, deviation: float, by_margin: float, by_deviation: float, dtype: torch.dtype
) -> None:
    """At eps = .031 and alpha = .52, for p = (.7, .2, .1)."""
    logits, y_ = logits_of(0.7, 0.2, 0.1, dtype=dtype), label(y)
    assert margin(logits, y_).item() == pytest.approx(margin_of, abs=1e-6)
    assert deviation_radius(logits, y_, 1.0, 1.0).log().item() == pytest.approx(deviation, abs=3e-7)
    assert margin_radius(logits, y_, 0.031, 0.52).item() == pytest.approx(by_margin, abs=6e-8)
    assert deviation_radius(logits, y_, 0.031, 0.52).item() == pytest.approx(by_deviation, abs=6e-8)


@pytest.mark.parametrize("runner", RUNNERS)
def test_radii_as_released_in_every_implementation(runner: str) -> None:
    logits, labels = logits_of(0.7, 0.2, 0.1, dtype=torch.float32).repeat(3, 1), torch.arange(3)
    for op, expected in (
        (MARGIN_RADIUS, [0.0402048, 0.0239026, 0.0226914]),
        (DEVIATION_RADIUS, [0.0413126, 0.0373927, 0.0387700]),
    ):
        (radius,) = outcome(op, (logits, labels, 0.031, 0.52), runner)
        torch.testing.assert_close(radius, torch.tensor(expected), rtol=0, atol=6e-8)


@pytest.mark.parametrize("classes", [2, 10, 17, 200])
def test_deviation_at_the_ends(classes: int) -> None:
    """1 at a certain right answer, 1 / sqrt(C - 1) at a certain wrong one; exactly 0 where all are equal."""
    logits = torch.zeros(3, classes)
    logits[:2, 1] = 200.0
    result = deviation_radius(logits, torch.tensor([1, 0, 0]), EPS, 0.52)
    assert result[0].item() == pytest.approx(EPS * math.exp(0.52), rel=1e-6)
    assert result[1].item() == pytest.approx(EPS * math.exp(0.52 / math.sqrt(classes - 1)), rel=1e-6)
    assert result[2].item() == torch.tensor(EPS).item()


def test_the_deviation_is_that_around_the_true_class() -> None:
    logits, labels = logits_and_labels()
    p = torch.softmax(logits.double(), 1)
    apart = p - p.gather(1, labels[:, None])
    expected = torch.exp(0.52 * (apart.square().sum(1) / 9).sqrt()) * EPS
    torch.testing.assert_close(deviation_radius(logits, labels, EPS, 0.52).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("p", "y", "score"), [((0.7, 0.2, 0.1), 0, 1.3970), ((0.1, 0.7, 0.2), 0, -0.8890)])
def test_standardised_score(p: tuple[float, ...], y: int, score: float) -> None:
    radius = standardised_radius(logits_of(*p), label(y), 1.0, 1.0)
    assert math.log(radius.item()) == pytest.approx(score, abs=5e-5)


@pytest.mark.parametrize("classes", [2, 10, 17, 200])
def test_the_standardised_score_at_the_ends(classes: int) -> None:
    """sqrt(C - 1) at a certain correct answer (3 for ten classes); exactly 0 at the uniform distribution."""
    logits = torch.zeros(2, classes)
    logits[0, 1] = 200.0
    result = standardised_radius(logits, torch.tensor([1, 0]), EPS, 0.1)
    assert result[0].item() == pytest.approx(EPS * math.exp(0.1 * math.sqrt(classes - 1)), rel=1e-5)
    assert result[1].item() == torch.tensor(EPS).item()


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), ValueError, r"\(B, C\)"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), ValueError, "C >= 2"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), TypeError, "float32"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), ValueError, r"labels must be \(3,\)"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32), TypeError, "int64"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "devices"),
    ],
)
def test_refusals(logits: torch.Tensor, labels: torch.Tensor, error: type[Exception], message: str) -> None:
    for f in (margin, *(partial(f, eps=EPS, alpha=1.0) for f in RADII)):
        with pytest.raises(error, match=message):
            f(logits, labels)
