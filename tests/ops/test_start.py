"""gaussian_start and uniform_start: the numbers themselves, their order, what they depend on, and the range."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import force_reference, gaussian_start, l2_start, philox_words, uniform_start
from mwpb_kernels.op import HAS_TRITON
from mwpb_kernels.philox import STREAM_GAUSSIAN, STREAM_UNIFORM
from mwpb_kernels.start import UNIFORM_START

SEED = torch.tensor([0x0123456789ABCDEF])
STARTS: list[Callable[..., torch.Tensor]] = [gaussian_start, uniform_start, l2_start]
IDS = ["gaussian", "uniform", "l2"]


def words_of(sample: int, elements: int, stream: int) -> list[int]:
    words = philox_words(torch.tensor([sample]), SEED, stream, -(-elements // 4))
    return words.flatten()[:elements].tolist()


def test_gaussian_is_box_muller_in_row_major_order() -> None:
    x = torch.zeros(2, 2, 1, 3)
    out = gaussian_start(x, 1.0, SEED, torch.tensor([7, 2**35]), -10, 10)
    for row, sample in zip(out, (7, 2**35), strict=True):
        words = words_of(sample, 8, STREAM_GAUSSIAN)
        expected = []
        for a, b in zip(words[::2], words[1::2], strict=True):
            radius = math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24))
            angle = 2 * math.pi * (b >> 8) / 2**24
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
        torch.testing.assert_close(row.flatten(), torch.tensor(expected[:6]), rtol=1e-5, atol=2e-6)


def test_uniform_is_exact() -> None:
    out = uniform_start(torch.zeros(1, 5), 1.0, SEED, torch.tensor([3]), -1, 1)
    assert out[0].tolist() == [2 * (w >> 8) / 2**24 - 1 for w in words_of(3, 5, STREAM_UNIFORM)]


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="Triton's interpreter is not in use")
def test_uniform_is_bit_equal_on_every_implementation() -> None:
    x, radius = torch.rand(3, 5, 7), torch.tensor([0.0, 0.03, 0.7])
    arguments = (x, radius, SEED, torch.arange(3), 0.0, 1.0)
    native = UNIFORM_START(*arguments)
    assert torch.equal(native, UNIFORM_START.reference(*arguments))
    assert torch.equal(native, UNIFORM_START.on_cuda(*arguments))


@pytest.mark.parametrize("start", STARTS, ids=IDS)
def test_layout_batch_and_position_do_not_matter(start: Callable[..., torch.Tensor]) -> None:
    """An element's noise depends on seed, index and its place in the sample; large samples are cut in boxes."""
    few, many = ((3, 3, 5, 9), (2, 2, 16, 16), (2, 3, 16, 1, 33)), ((2, 3, 59, 83), (2, 4, 60, 64), (1, 5, 91, 93))
    for shape in (*few, *many):
        x = torch.rand(shape)
        index = torch.arange(10, 10 + shape[0])
        plain = start(x, 0.1, SEED, index)
        wide = torch.rand(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(x)
        reverse = torch.arange(shape[0] - 1, -1, -1)
        torch.testing.assert_close(start(x[reverse], 0.1, SEED, index[reverse]), plain[reverse], rtol=0, atol=0)
        torch.testing.assert_close(start(x[1:], 0.1, SEED, index[1:]), plain[1:], rtol=0, atol=0)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        reordered = x.transpose(1, -1).transpose(0, 1).contiguous().transpose(0, 1).transpose(1, -1)
        for y in (last, reordered, wide):
            out = start(y, 0.1, SEED, index)
            torch.testing.assert_close(out, plain, rtol=0, atol=2e-8 if start is l2_start else 0)
            assert out.stride() == torch.empty_like(y).stride()


@pytest.mark.parametrize("start", STARTS, ids=IDS)
def test_what_the_noise_depends_on(start: Callable[..., torch.Tensor]) -> None:
    x = torch.full((2, 40), 0.5)
    index = torch.tensor([4, 5])
    out = start(x, 0.1, SEED, index)
    assert torch.equal(out, start(x, 0.1, SEED.clone(), index.clone()))
    for other in (
        start(x, 0.1, SEED + 1, index),
        start(x, 0.1, SEED + 2**32, index),
        start(x, 0.1, SEED, index + 2),
        start(x, 0.1, SEED, index + 2**32),
    ):
        assert (other != out).float().mean() > 0.95
    assert (out[0] != out[1]).float().mean() > 0.95
    seed = SEED.clone()
    seed += 1  # the seed is read when the op runs
    assert torch.equal(start(x, 0.1, seed, index), start(x, 0.1, SEED + 1, index))


def test_streams_differ() -> None:
    x = torch.full((1, 400), 0.5)
    noise = [start(x, 0.1, SEED, torch.tensor([1])).flatten() for start in STARTS]
    assert torch.corrcoef(torch.stack(noise)).fill_diagonal_(0).abs().max() < 0.25


@pytest.mark.parametrize("start", STARTS, ids=IDS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0,)])
def test_empty(start: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> None:
    out = start(torch.empty(shape), 0.1, SEED, torch.arange(shape[0]))
    assert out.shape == shape


@pytest.mark.parametrize("start", STARTS, ids=IDS)
def test_nothing_but_the_clamp_at_scale_zero(start: Callable[..., torch.Tensor]) -> None:
    x = torch.tensor([[-0.5, 0.25, 1.5, float("nan")]])
    out = start(x, 0.0, SEED, torch.tensor([0]), 0.0, 1.0)
    torch.testing.assert_close(out, torch.tensor([[0, 0.25, 1, float("nan")]]), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    radius=st.floats(0, 1, width=32),
    seed=st.integers(-(2**63), 2**63 - 1),
    first=st.integers(-(2**62), 2**62),
)
def test_uniform_stays_in_ball_and_range(shape: list[int], radius: float, seed: int, first: int) -> None:
    x = torch.rand(shape)
    index = torch.arange(first, first + shape[0])
    out = uniform_start(x, torch.full((shape[0],), radius), torch.tensor([seed]), index)
    assert (out - x).abs().max() <= radius + 2**-23
    assert 0 <= out.min() <= out.max() <= 1
    with force_reference():
        assert torch.equal(uniform_start(x, radius, torch.tensor(seed), index), out)


def test_moments() -> None:
    x = torch.zeros(200, 1000)
    z = gaussian_start(x, 1.0, SEED, torch.arange(200), -9, 9).double()
    u = uniform_start(x, 1.0, SEED, torch.arange(200), -9, 9).double()
    error = 1 / math.sqrt(x.numel())  # five standard errors
    assert abs(z.mean()) < 5 * error
    assert abs(z.var() - 1) < 5 * math.sqrt(2) * error
    assert z.abs().max() < math.sqrt(48 * math.log(2)) + 1e-5
    assert abs(u.mean()) < 5 * error / math.sqrt(3)
    assert abs(u.var() - 1 / 3) < 5 * error
    assert u.min() >= -1
    assert u.max() < 1


def test_float64_has_the_same_noise() -> None:
    x = torch.rand(2, 30)
    for start in STARTS:
        single, double = (start(t, 0.1, SEED, torch.arange(2)) for t in (x, x.double()))
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", STARTS, ids=IDS)
def test_no_gradient_flows(start: Callable[..., torch.Tensor]) -> None:
    assert not start(torch.rand(2, 3, requires_grad=True), 0.1, SEED, torch.arange(2)).requires_grad


@pytest.mark.parametrize("start", STARTS, ids=IDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(())), ValueError, "scalar"),
        (dict(x=torch.zeros(2, 3, dtype=torch.uint8)), TypeError, "or float64, not torch.uint8"),
        (dict(scale=-0.1), ValueError, "must not be negative"),
        (dict(seed=torch.tensor([1.0])), TypeError, "seed must be"),
        (dict(seed=torch.tensor([1, 2])), TypeError, "seed must be"),
        (dict(index=torch.arange(3)), TypeError, "index must be"),
        (dict(index=torch.zeros(2, dtype=torch.int32)), TypeError, "index must be"),
        (dict(lo=2.0), ValueError, "lo must not exceed hi"),
        (dict(x=torch.zeros(2, 3, device="meta")), ValueError, "different devices"),
    ],
)
def test_refuses(
    start: Callable[..., torch.Tensor], change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = dict(x=torch.zeros(2, 3), scale=0.1, seed=SEED, index=torch.arange(2), lo=0.0, hi=1.0) | change
    with pytest.raises(error, match=message):
        start(*arguments.values())
