"""The fused scale, bias and ReLU: hand values, an eval-mode batch norm, its mask, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from mwpb_kernels import force_reference, scale_bias_relu


@pytest.fixture(params=["dispatched", "reference"], autouse=True)
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with force_reference(request.param == "reference"):
        yield


def test_by_hand() -> None:
    x = torch.tensor([[[1.0, -2.0], [3.0, 0.5]]], requires_grad=True)  # one image, two channels of two pixels
    out = scale_bias_relu(x, torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0]))
    assert out.tolist() == [[[2.5, 0.0], [0.0, 0.5]]]
    (gradient,) = torch.autograd.grad(out, x, torch.tensor([[[1.0, 10.0], [10.0, 4.0]]]))
    assert gradient.tolist() == [[[2.0, 0.0], [0.0, -4.0]]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_frozen_batch_norm_and_its_relu(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 6, 5, 3, generator=generator, dtype=dtype).contiguous(memory_format=memory_format)
    mean, var, weight, bias = torch.rand(4, 6, generator=generator, dtype=dtype) + 0.2
    scale = weight / torch.sqrt(var + 1e-5)
    plain, fused = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = F.relu(F.batch_norm(plain, mean, var, weight, bias, training=False, eps=1e-5))
    out = scale_bias_relu(fused, scale, bias - mean * scale)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=memory_format)
    incoming = torch.randn(x.shape, generator=generator, dtype=dtype)
    (ours,), (theirs,) = torch.autograd.grad(out, fused, incoming), torch.autograd.grad(expected, plain, incoming)
    torch.testing.assert_close(ours, theirs)


def test_the_input_is_not_kept_for_backward() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = scale_bias_relu(x, torch.ones(3), torch.zeros(3))
    with torch.no_grad():
        x.fill_(math.nan)  # backward would fail, or give NaN, if it read this
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, (out > 0).float())


def test_nan_stays_and_lets_the_gradient_through() -> None:
    x = torch.tensor([[math.nan, -1.0]], requires_grad=True)
    out = scale_bias_relu(x, torch.full((2,), 3.0), torch.zeros(2))
    assert out[0, 0].isnan()
    assert out[0, 1] == 0
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.tolist() == [[3.0, 0.0]]  # as torch.relu's


@pytest.mark.parametrize(
    ("x", "scale", "bias", "error", "match"),
    [
        (torch.ones(3), torch.ones(3), torch.ones(3), ValueError, r"\(B, C"),
        (torch.ones(2, 3), torch.ones(2), torch.ones(3), ValueError, "scale must be"),
        (torch.ones(2, 3), torch.ones(3), torch.ones(3, 1), ValueError, "bias must be"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(3), torch.ones(3), TypeError, "int64"),
        (torch.ones(2, 3).half(), torch.ones(3).half(), torch.ones(3), TypeError, "float32 beside"),
        (torch.ones(2, 3).double(), torch.ones(3), torch.ones(3), TypeError, "float64 beside"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), torch.ones(3), ValueError, "different devices"),
    ],
)
def test_refuses(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        scale_bias_relu(x, scale, bias)
