"""l2_step_ and l2_start: hand values, norms at the ends of the number range, the ball, the distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import force_reference, l2, l2_start, l2_step_
from mwpb_kernels.op import HAS_TRITON

NAN, INF = float("nan"), float("inf")
SEED = torch.tensor([99])


@pytest.fixture(params=["native", "reference", "triton"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.Tensor]]:
    if request.param == "triton":
        if not HAS_TRITON or torch.cuda.is_available():
            pytest.skip("Triton's interpreter is not in use")
        monkeypatch.setattr(l2, "L2_STEP", l2.L2_STEP.on_cuda)
    with force_reference(request.param == "reference"):
        yield l2_step_


def close(actual: torch.Tensor, expected: list[list[float]], atol: float = 1e-7) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def test_hand_values(step: Callable[..., torch.Tensor]) -> None:
    # a 3-4-5 gradient: a step of .05 stays inside a ball of .06, and ends on the surface of one of .025
    x = torch.full((2, 2), 0.5)
    x_adv = x.clone()
    out = step(x_adv, torch.tensor([[3.0, -4.0]]).expand(2, 2), x, torch.tensor([0.06, 0.025]), 0.05)
    assert out is x_adv
    close(out, [[0.53, 0.46], [0.515, 0.48]])


def test_clamps_after_the_projection(step: Callable[..., torch.Tensor]) -> None:
    x = torch.tensor([[0.99, 0.5]])
    close(step(x.clone(), torch.tensor([[3.0, 4.0]]), x, 0.05, 0.5), [[1.0, 0.54]])
    close(step(x.clone(), torch.tensor([[3.0, 4.0]]), x, 0.05, 0.5, lo=0.0, hi=0.53), [[0.53, 0.53]])


def test_a_start_outside_the_ball_is_projected(step: Callable[..., torch.Tensor]) -> None:
    x = torch.full((1, 2), 0.5)
    close(step(torch.tensor([[0.8, 0.9]]), torch.zeros(1, 2), x, 0.05, 0.1), [[0.53, 0.54]])


def test_no_gradient_no_step(step: Callable[..., torch.Tensor]) -> None:
    x_adv = torch.rand(2, 3, 5)
    before = x_adv.clone()
    step(x_adv, torch.zeros(2, 3, 5), before - 0.001, 0.1, 0.05)
    assert torch.equal(x_adv, before)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-25),  # squares underflow
        (torch.float32, 2.0**-148),  # a subnormal number, whose inverse overflows
        (torch.float32, 5e37),  # squares overflow
        (torch.bfloat16, 2.0**-120),
        (torch.float16, 2.0**-24),  # the smallest subnormal number
        (torch.float16, 16000.0),
        (torch.float64, 2.0**-1070),
        (torch.float64, 2.0**1018),
    ],
)
def test_the_size_of_the_gradient_does_not_matter(
    step: Callable[..., torch.Tensor], dtype: torch.dtype, size: float
) -> None:
    image = torch.float64 if dtype == torch.float64 else torch.float32
    grad = (torch.tensor([[3.0, -4.0], [0.0, 2.0]], dtype=torch.float64) * size).to(dtype)
    x = torch.full((2, 2), 0.5, dtype=image)
    close(step(x.clone(), grad, x, 1.0, 0.05), [[0.53, 0.46], [0.5, 0.55]], atol=2e-7)


def test_non_finite_operands_and_nan_lengths_make_their_sample_nan(step: Callable[..., torch.Tensor]) -> None:
    batch = 9
    x, x_adv, grad = (torch.full((batch, 3), v) for v in (0.5, 0.5, 1.0))
    radius, size = torch.full((batch,), 0.1), torch.full((batch,), 0.1)
    x[0, 1], x[1, 1], x_adv[2, 0], x_adv[3, 0], grad[4, 2], grad[5, 2] = NAN, INF, NAN, -INF, NAN, INF
    radius[6], size[7] = NAN, NAN
    out = step(x_adv, grad, x, radius, size)
    assert out.isnan().tolist() == [[True] * 3] * 8 + [[False] * 3]


def test_an_infinite_radius_leaves_the_step_alone(step: Callable[..., torch.Tensor]) -> None:
    x = torch.full((1, 2), 0.5)
    close(step(x.clone(), torch.tensor([[3.0, -4.0]]), x, INF, 0.05), [[0.53, 0.46]])


def test_reaches_the_optimum_of_a_linear_model(step: Callable[..., torch.Tensor]) -> None:
    """The loss w.x is largest in the ball at x + radius * w / |w|; the range is wide enough not to matter."""
    x, w = torch.rand(4, 3, 7, 3), torch.randn(4, 3, 7, 3)
    radius = torch.tensor([0.1, 0.5, 1.0, 3.0])
    x_adv = l2_start(x, radius, SEED, torch.arange(4), -9, 9)
    for _ in range(40):
        step(x_adv, w, x, radius, radius / 2, -9, 9)
    best = x + (radius / w.flatten(1).norm(dim=1)).view(-1, 1, 1, 1) * w
    # the angle to the optimum shrinks by a factor each step; what is left is rounding
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    radius=st.floats(0, 4, width=32),
    size=st.floats(0, 4, width=32),
    seed=st.integers(0, 2**31),
)
def test_stays_in_ball_and_range(shape: list[int], radius: float, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, x_adv = (torch.rand(shape, generator=generator) for _ in range(2))
    grad = torch.randn(shape, generator=generator) * 10.0 ** (seed % 60 - 30)
    with force_reference():
        expected = l2_step_(x_adv.clone(), grad, x, radius, size)
    l2_step_(x_adv, grad, x, radius, size)
    torch.testing.assert_close(x_adv, expected, rtol=1e-5, atol=1e-6)
    length = (x_adv.double() - x.double()).reshape(shape[0], -1).norm(dim=1)
    assert length.max() <= radius * (1 + 1e-6) + 2**-23 * math.sqrt(x[0].numel())
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


@pytest.mark.parametrize("batch", [1, 3])
def test_large_samples(batch: int) -> None:
    """Several pieces a sample, by one thread each and by all threads together: the same bits."""
    x = torch.rand(batch, 3, 83, 97).contiguous(memory_format=torch.channels_last)
    grad, start = torch.randn(batch, 3, 83, 97), (x + 0.01).clamp(0, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            results.append(l2_step_(start.clone(), grad, x, 0.5, 0.3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with force_reference():
        torch.testing.assert_close(results[0], l2_step_(start.clone(), grad, x, 0.5, 0.3), rtol=1e-5, atol=1e-6)


def test_refuses() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="radius must not be negative"):
        l2_step_(x.clone(), x, x, -1.0, 0.1)
    with pytest.raises(ValueError, match="step_size must not be negative"):
        l2_step_(x.clone(), x, x, 1.0, -0.1)
    with pytest.raises(ValueError, match="requires grad"):
        l2_step_(x.clone().requires_grad_(), x, x, 1.0, 0.1)


# start -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(50, 1), (50, 2, 3), (3, 3, 71, 67)])
def test_start_lies_in_the_ball(shape: tuple[int, ...]) -> None:
    radius = torch.linspace(0, 3, shape[0])
    x = torch.rand(shape)
    for lo, hi in ((-20.0, 20.0), (0.0, 1.0)):
        out = l2_start(x, radius, SEED, torch.arange(shape[0]), lo, hi)
        length = (out.double() - x.double()).flatten(1).norm(dim=1)
        assert (length <= radius * (1 + 1e-6) + 2**-21 * math.sqrt(x[0].numel())).all()
        assert lo <= out.min() <= out.max() <= hi


def test_start_is_uniform_in_the_ball() -> None:
    """(|d| / radius)^n is uniform in [0, 1], the direction is symmetric and has no preferred axis."""
    batch, n = 20_000, 3
    d = l2_start(torch.zeros(batch, n), 2.0, SEED, torch.arange(batch), -9, 9).double() / 2
    share = (d.norm(dim=1) ** n).sort().values
    distance = (share - torch.arange(0.5, batch) / batch).abs().max()
    assert distance < 1.95 / math.sqrt(batch)  # Kolmogorov and Smirnov, 0.1 %
    unit = d / d.norm(dim=1, keepdim=True)
    error = 1 / math.sqrt(batch)
    assert unit.mean(0).abs().max() < 5 * error
    assert (unit.T @ unit / batch - torch.eye(n) / n).abs().max() < 5 * error


def test_start_in_one_dimension_is_a_random_sign_times_a_uniform_length() -> None:
    d = l2_start(torch.zeros(4000, 1), 1.0, SEED, torch.arange(4000), -9, 9).flatten().double()
    assert abs(d.mean()) < 5 / math.sqrt(3 * 4000)
    assert abs(d.abs().mean() - 0.5) < 5 / math.sqrt(12 * 4000)


def test_start_does_not_spread_nan_beyond_its_pixel_but_a_nan_radius_does() -> None:
    x = torch.full((2, 3), 0.5)
    x[0, 1] = NAN
    out = l2_start(x, torch.tensor([0.1, NAN]), SEED, torch.arange(2))
    assert out.isnan().tolist() == [[False, True, False], [True] * 3]
