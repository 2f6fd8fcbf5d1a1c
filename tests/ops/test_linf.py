"""linf_step_: hand values, the optimum on a linear model, the ball and the pixel range, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import force_reference, linf, linf_step_
from mwpb_kernels.op import HAS_TRITON

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["native", "reference", "triton"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.Tensor]]:
    if request.param == "triton":
        if not HAS_TRITON or torch.cuda.is_available():
            pytest.skip("Triton's interpreter is not in use")
        monkeypatch.setattr(linf, "LINF_STEP", linf.LINF_STEP.on_cuda)
    with force_reference(request.param == "reference"):
        yield linf_step_


def test_hand_values(step: Callable[..., torch.Tensor]) -> None:
    # each column: a free step, one against the ball, one against the pixel range, a zero gradient
    x = torch.tensor([[0.5, 0.5, 0.99, 0.25]])
    x_adv = torch.tensor([[0.5, 0.53, 1.0, 0.25]])
    grad = torch.tensor([[-2.0, 1e-30, 3.0, 0.0]])
    out = step(x_adv, grad, x, 4 / 128, 1 / 128)
    assert out is x_adv
    expected = [[0.5 - 1 / 128, 0.5 + 4 / 128, 1.0, 0.25]]
    assert out.tolist() == torch.tensor(expected).tolist()


def test_each_sample_has_its_own_radius_and_step(step: Callable[..., torch.Tensor]) -> None:
    x = torch.full((3, 2, 1, 2), 0.5)
    radius, size = torch.tensor([0.25, 0.0625, 0.0]), torch.tensor([0.125, 0.125, 0.125])
    out = step(x.clone(), torch.ones_like(x), x, radius, size)
    assert out.flatten(1).unique(dim=1).flatten().tolist() == [0.625, 0.5625, 0.5]


def test_numbers_equal_tensors(step: Callable[..., torch.Tensor]) -> None:
    x, grad = torch.rand(4, 3, 5), torch.randn(4, 3, 5)
    by_number = step(x.clone(), grad, x, 0.03, 0.01)
    assert torch.equal(by_number, step(x.clone(), grad, x, torch.full((4,), 0.03), torch.full((4,), 0.01)))
    # a tensor of another float type takes the images' type
    assert torch.equal(by_number, step(x.clone(), grad, x, torch.full((4,), 0.03).double(), 0.01))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sign_of_every_kind_of_gradient(step: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    grad = torch.tensor([[3.0, -3.0, tiny, -tiny, 0.0, -0.0, NAN, INF, -INF]], dtype=dtype)
    x = torch.full_like(grad, 0.5, dtype=torch.float32)
    moved = (step(x.clone(), grad, x, 0.25, 0.125) - 0.5) / 0.125
    assert moved.tolist() == [[1, -1, 1, -1, 0, 0, 0, 1, -1]]


def test_subnormal_half_gradients_have_a_sign(step: Callable[..., torch.Tensor]) -> None:
    grad = torch.tensor([[2.0**-24, -(2.0**-24)]], dtype=torch.float16)
    x = torch.full((1, 2), 0.5)
    assert step(x.clone(), grad, x, 0.25, 0.125).tolist() == [[0.625, 0.375]]


def test_nan_in_any_image_or_radius_gives_nan(step: Callable[..., torch.Tensor]) -> None:
    x = torch.tensor([[0.5, NAN, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    x_adv = torch.tensor([[NAN, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    radius, size = torch.tensor([0.1, NAN, 0.1]), torch.tensor([0.1, 0.1, NAN])
    out = step(x_adv, torch.ones(3, 3), x, radius, size)
    assert out.isnan().tolist() == [[True, True, False], [True] * 3, [True] * 3]


def test_reaches_the_optimum_of_a_linear_model(step: Callable[..., torch.Tensor]) -> None:
    """The loss w.x is largest in the ball at x + radius * sign(w), clamped; ten steps of radius / 4 get there."""
    x = torch.rand(5, 3, 7, 3).contiguous(memory_format=torch.channels_last)
    w = torch.randn(5, 3, 7, 3)
    radius = torch.tensor([0.01, 0.03, 0.05, 0.3, 1.5])
    x_adv = x.clone()
    for _ in range(10):
        step(x_adv, w, x, radius, radius / 4)
    best = (x + radius.view(-1, 1, 1, 1) * w.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-7)
    assert x_adv.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    radius=st.floats(0, 2, width=32),
    size=st.floats(0, 2, width=32),
    seed=st.integers(0, 2**31),
)
def test_bit_equal_to_numpy_inside_ball_and_range(shape: list[int], radius: float, size: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, start = (generator.random(shape, dtype=np.float32) for _ in range(2))
    grad = generator.integers(-1, 2, shape).astype(np.float32)
    r, s = np.float32(radius), np.float32(size)
    low, high = x - r, x + r
    expected = np.clip(np.minimum(np.maximum(start + s * grad, low), high), np.float32(0.125), np.float32(0.75))
    x_adv = torch.from_numpy(start.copy())
    linf_step_(x_adv, torch.from_numpy(grad), torch.from_numpy(x), radius, size, 0.125, 0.75)
    assert x_adv.numpy().tobytes() == np.asarray(expected).tobytes()
    inside = (x >= 0.125) & (x <= 0.75)  # else the range, which applies last, may leave the ball
    distance = np.abs(x_adv.numpy().astype(np.float64) - x)[inside]
    assert (distance <= float(r) + 2**-23 * (1 + float(r))).all()


def test_large_samples_are_cut_the_same_way() -> None:
    """More elements than one piece, with operands that disagree about the layout."""
    x = torch.rand(2, 3, 83, 97)
    grad = torch.randn(2, 97, 83, 3).permute(0, 3, 2, 1)
    start = (x + 0.02).contiguous(memory_format=torch.channels_last)
    radius = torch.tensor([0.03, 0.05])
    out = linf_step_(start.clone(), grad, x, radius, radius / 2)
    with force_reference():
        assert torch.equal(out, linf_step_(start.clone(), grad, x, radius, radius / 2))


def test_x_adv_may_be_x_itself() -> None:
    x, grad = torch.rand(3, 5), torch.randn(3, 5)
    expected = linf_step_(x.clone(), grad, x, 0.1, 0.05)
    assert torch.equal(linf_step_(x, grad, x, 0.1, 0.05), expected)


def test_autograd_sees_the_write() -> None:
    x_adv = torch.rand(2, 3)
    weight = torch.ones(2, 3, requires_grad=True)
    loss = (weight * x_adv).sum()
    linf_step_(x_adv, torch.ones(2, 3), x_adv.clone(), 0.1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_leaf_may_be_stepped_without_grad_mode() -> None:
    x_adv = torch.full((1, 2), 0.5, requires_grad=True)
    with torch.no_grad():
        linf_step_(x_adv, torch.ones(1, 2), x_adv.detach().clone(), 0.25, 0.25)
    assert x_adv.tolist() == [[0.75, 0.75]]


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x_adv=torch.zeros(2, 4)), ValueError, "x_adv is"),
        (dict(grad=torch.zeros(2, 4)), ValueError, "grad is"),
        (dict(x_adv=X.double()), TypeError, "x_adv is torch.float64"),
        (dict(x=X.half(), x_adv=X.half()), TypeError, "x_adv is torch.float16.*: pass torch.float32, a half type"),
        (dict(x_adv=X.bfloat16()), TypeError, "x_adv is torch.bfloat16.*: pass torch.float32, a half type rounds"),
        (dict(x=X.half(), x_adv=X.double()), TypeError, "x_adv is torch.float64, but x is torch.float16$"),
        (dict(x=X.int()), TypeError, "x must be float32, bfloat16, float16 or float64, not torch.int32"),
        (dict(grad=X.int()), TypeError, "grad must be"),
        (dict(radius=-0.1), ValueError, "radius must not be negative"),
        (dict(radius=NAN), ValueError, "radius must not be negative"),
        (dict(step_size=-1), ValueError, "step_size must not be negative"),
        (dict(radius=torch.zeros(3)), ValueError, "radius must be"),
        (dict(radius=torch.zeros(2, dtype=torch.int64)), TypeError, "radius must be floating point"),
        (dict(lo=1.0, hi=0.0), ValueError, "lo must not exceed hi"),
        (dict(x_adv=torch.zeros(2, 1).expand(2, 3)), ValueError, "expanded"),
        (dict(x_adv=torch.zeros(2, 3, requires_grad=True)), ValueError, "requires grad"),
        (dict(x=torch.zeros(2, 3, device="meta")), ValueError, "different devices"),
        (dict(x=torch.zeros(()), x_adv=torch.zeros(()), grad=torch.zeros(())), ValueError, "scalar"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = dict(x_adv=X.clone(), grad=X, x=X, radius=0.1, step_size=0.1) | change
    with pytest.raises(error, match=message):
        linf_step_(**arguments)  # type: ignore[arg-type]
