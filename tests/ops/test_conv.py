"""The convolution with what follows it in the same pass, beside PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OPS, compare, plain_copy, samples, tensors
from mwpb_kernels import conv_input_grad, conv_reference, conv_relu
from mwpb_kernels.bias_add_relu import pack


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (5, 3, 1)])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_both_are_pytorchs_convolution(kernel: int, stride: int, padding: int, size: tuple[int, int]) -> None:
    x = torch.rand(2, 5, *size, dtype=torch.float64).requires_grad_()
    weight = torch.randn(6, 5, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    plain = F.conv2d(x, weight, None, stride, padding)
    skip = torch.randn_like(plain)
    out, gate = conv_relu(x.detach(), weight, bias, skip, stride, padding)
    expected = torch.relu(plain + bias[:, None, None] + skip).detach()
    torch.testing.assert_close(out, expected)
    assert torch.equal(gate, pack(expected > 0))
    (gradient,) = torch.autograd.grad(plain, x, skip)
    found = conv_input_grad(skip, weight, None, None, stride, padding, *size)
    torch.testing.assert_close(found, gradient)
    other, is_open = torch.randn_like(gradient), torch.rand_like(gradient) < 0.5
    found = conv_input_grad(skip, weight, other, pack(is_open), stride, padding, *size)
    torch.testing.assert_close(found, torch.where(is_open, gradient + other, 0))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["conv_relu", "conv_input_grad", "stem_conv", "stem_step_"])
def test_the_reference_takes_a_large_batch_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    for args in samples(op):
        whole, apart = plain_copy(args), plain_copy(args)
        expected = [*tensors(op.reference(*whole)), *(whole[i] for i in op.mutates)]
        with monkeypatch.context() as patch:
            patch.setattr(conv_reference, "AT_ONCE", 1)
            found = [*tensors(op.reference(*apart)), *(apart[i] for i in op.mutates)]
        compare(op, found, expected, "image by image")


X, W, BIAS, GRAD = torch.ones(2, 3, 4, 4), torch.ones(5, 3, 3, 3), torch.ones(5), torch.ones(2, 5, 4, 4)
GATE = torch.ones(2, 4, 4, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "args", "error", "match"),
    [
        (conv_relu, (X[0], W, BIAS), ValueError, r"x must be \(B, channels"),
        (conv_relu, (X.int(), W, BIAS), TypeError, "int32"),
        (conv_relu, (X, W.half(), BIAS), ValueError, "weight must be"),
        (conv_relu, (X, W[..., :2], BIAS), ValueError, "weight must be"),
        (conv_relu, (X, W, BIAS[:2]), ValueError, "bias must be"),
        (conv_relu, (X, W, BIAS, GRAD, 2, 1), ValueError, "skip must be"),
        (conv_relu, (X, W, BIAS, None, 0, 1), ValueError, "stride must be"),
        (conv_relu, (X, W.to("meta"), BIAS), ValueError, "different devices"),
        (conv_input_grad, (GRAD, W, None, None, 1, 0, 4, 4), ValueError, r"grad must be \(B, 5, 2, 2\)"),
        (conv_input_grad, (GRAD, W, GRAD, None, 1, 1, 4, 4), ValueError, "other must be"),
        (conv_input_grad, (GRAD, W, X, GATE.int(), 1, 1, 4, 4), ValueError, "gate must be"),
    ],
)
def test_refuses(call: Any, args: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(*args)
