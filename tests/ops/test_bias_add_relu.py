"""The end of a residual layer and its backward, beside what PyTorch's own operations make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mwpb_kernels import bias_add_relu_, gated_sum
from mwpb_kernels.bias_add_relu import pack, unpack


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 64])
def test_a_gate_is_a_bit_for_each_channel(channels: int) -> None:
    is_open = torch.rand(3, channels, 2, 5) < 0.5
    gate = pack(is_open)
    assert gate.shape == (3, 2, 5, -(-channels // 8))
    assert torch.equal(unpack(gate, channels), is_open)
    assert (gate[1, 1, 4, channels // 9] & 1).bool() == is_open[1, channels // 9 * 8, 1, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("skipped", [True, False])
def test_both_are_autograds_relu(dtype: torch.dtype, skipped: bool) -> None:
    """To the bit, with one rounding; backward the gradient of torch.relu, with two behind it."""
    x, skip, a, b = (
        torch.randn(4, 24, 5, 3).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(4)
    )
    bias = torch.randn(24, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x[0, :4, 0, 0] = torch.tensor([float("nan"), -0.0, float("inf"), float("-inf")])
    sums = x.to(bias.dtype) + bias[:, None, None] + (skip.to(bias.dtype) if skipped else 0)
    leaf = sums.to(dtype).requires_grad_()
    expected = torch.relu(leaf)
    gate = bias_add_relu_(out := x.clone(), bias, skip if skipped else None)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=0, equal_nan=True)
    (gradient,) = torch.autograd.grad(expected, leaf, (a.to(bias.dtype) + b.to(bias.dtype)).to(dtype))
    torch.testing.assert_close(gated_sum(a, b, gate), gradient, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(torch.relu(leaf), leaf, a)
    assert torch.equal(gated_sum(a, None, gate), gradient)


def test_what_rounds_to_zero_is_closed() -> None:
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float16)
    gate = bias_add_relu_(x, torch.tensor([-1 + 1e-9, -1 + 2.0**-20]))
    assert x.tolist() == [[0.0, 2.0**-20]]
    assert gate.tolist() == [[2]]


def test_nothing_passes_a_closed_gate() -> None:
    grad = torch.tensor([[float("nan"), float("inf"), 1.0]])
    assert gated_sum(grad, grad, torch.tensor([[4]], dtype=torch.uint8)).tolist() == [[0.0, 0.0, 2.0]]


X, BIAS, GATE = torch.ones(2, 3, 4, 4), torch.ones(3), torch.ones(2, 4, 4, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "args", "error", "match"),
    [
        (bias_add_relu_, (torch.ones(3), BIAS), ValueError, r"x must be \(B, C"),
        (bias_add_relu_, (X, torch.ones(2)), ValueError, "bias must be"),
        (bias_add_relu_, (X.half(), BIAS.half()), TypeError, "float32 beside"),
        (bias_add_relu_, (X, BIAS, X[:1]), ValueError, "skip is"),
        (bias_add_relu_, (X, BIAS, X.half()), TypeError, "skip is"),
        (bias_add_relu_, (X[:1].expand(2, -1, -1, -1), BIAS), ValueError, "expanded"),
        (bias_add_relu_, (X.clone().requires_grad_(), BIAS), ValueError, "requires grad"),
        (gated_sum, (X.int(), None, GATE), TypeError, "int32"),
        (gated_sum, (X, X.half(), GATE), TypeError, "b is"),
        (gated_sum, (X, None, GATE[..., :0]), ValueError, "gate must be"),
        (gated_sum, (X, None, GATE.int()), ValueError, "gate must be"),
        (gated_sum, (X, None, GATE.to("meta")), ValueError, "different devices"),
    ],
)
def test_refuses(call: Any, args: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(*args)
