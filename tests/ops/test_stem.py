"""The layer that reads the image, and its step of an attack, beside PyTorch's operations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import INTERPRETED, RUNNERS, outcome
from mwpb_kernels import linf_step_, stem_conv, stem_step_
from mwpb_kernels.bias_add_relu import pack
from mwpb_kernels.stem import STEM_CONV, STEM_STEP

GEOMETRY = pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (7, 2, 3), (1, 1, 0), (5, 3, 1)])
RUNNER = pytest.mark.parametrize("runner", ["reference", *(["triton"] if "triton" in RUNNERS else [])])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def bound(runner: str) -> float:
    """Of a product of parts in bfloat16. Triton's interpreter cuts off where a device rounds to the nearest, so
    that each part is twice as far off."""
    return 2.0**-12 if runner == "triton" and INTERPRETED else 2.0**-15


@GEOMETRY
@pytest.mark.parametrize("relu", [True, False])
def test_it_is_pytorchs_convolution(kernel: int, stride: int, padding: int, relu: bool) -> None:
    x = torch.rand(2, 3, 9, 12, dtype=torch.float64).requires_grad_()
    weight, bias = torch.randn(6, 3, kernel, kernel).double(), torch.randn(6).double()
    plain = F.conv2d(x, weight, bias, stride, padding)
    out, gate = stem_conv(x.detach(), weight, bias, relu, stride, padding)
    expected = (F.relu(plain) if relu else plain).detach()
    assert torch.equal(out, expected.bfloat16())
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gate, pack(expected > 0)) if relu else gate.shape == (*plain.shape[:1], *plain.shape[2:], 0)
    incoming = torch.randn_like(plain)
    (gradient,) = torch.autograd.grad(plain, x, incoming)
    radius = torch.tensor([0.03, 0.05], dtype=torch.float64)
    stepped = linf_step_(x.detach().clone(), gradient, x.detach(), radius, radius / 4)
    found = stem_step_(x.detach().clone(), incoming, weight, x.detach(), radius, radius / 4, stride, padding)
    assert torch.equal(found, stepped)


@RUNNER
@HALVES
def test_the_image_is_not_rounded(runner: str, dtype: torch.dtype) -> None:
    """Before its last rounding a result is as near to the exact one as the split allows, where rounding the image
    would move it a hundred times as far."""
    x, weight, bias = torch.rand(4, 3, 12, 12), torch.randn(24, 3, 3, 3), torch.randn(24)
    out, _ = outcome(STEM_CONV, (x, weight, bias, False, 1, 1, dtype), runner)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), 1, 1)
    size = F.conv2d(x.double(), weight.double().abs(), None, 1, 1)
    last = torch.finfo(dtype).eps * (2 if runner == "triton" and INTERPRETED else 1) / 2
    assert ((out.double() - exact).abs() <= bound(runner) * size + last * exact.abs() + 2**-25).all()
    # and so they round as the exact ones do, but where one of those lies by the middle of two
    assert runner == "triton" or (out == exact.to(dtype)).double().mean() > 0.95
    from_rounded = F.conv2d(x.bfloat16().double(), weight.bfloat16().double(), bias.double(), 1, 1).to(dtype)
    assert (from_rounded == exact.to(dtype)).double().mean() < 0.9


@RUNNER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_signs_are_those_of_the_exact_gradient(runner: str, dtype: torch.dtype) -> None:
    x, weight = torch.rand(3, 3, 10, 8), torch.randn(40, 3, 3, 3)
    incoming, start = torch.randn(3, 40, 10, 8).to(dtype), x + 0.01 * torch.randn(3, 3, 10, 8)
    radius = torch.tensor([0.02, 0.03, 0.04])
    exact, size = (
        F.conv_transpose2d(f(incoming.double()), f(weight.double()), None, 1, 1) for f in (lambda t: t, torch.abs)
    )
    (found,) = outcome(STEM_STEP, (start, incoming, weight, x, radius, radius / 4, 1, 1, 0.0, 1.0), runner)
    expected = linf_step_(start.clone(), exact, x, radius, radius / 4)
    sure = exact.abs() > bound(runner) * size
    assert sure.double().mean() > 0.99
    assert torch.equal(found[sure], expected[sure])


@RUNNER
def test_each_image_has_its_own_radius_and_step(runner: str) -> None:
    x = torch.full((3, 1, 2, 2), 0.5)
    radius, step = torch.tensor([0.25, 0.0625, 0.0]), torch.full((3,), 0.125)
    incoming, weight = torch.ones(3, 2, 2, 2).bfloat16(), torch.ones(2, 1, 1, 1)
    (found,) = outcome(STEM_STEP, (x.clone(), incoming, weight, x, radius, step, 1, 0, 0.0, 1.0), runner)
    assert found.flatten(1).unique(dim=1).flatten().tolist() == [0.625, 0.5625, 0.5]
    (found,) = outcome(STEM_STEP, (x.clone(), -incoming, weight, x, radius, step, 1, 0, 0.45, 1.0), runner)
    assert found.flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([0.45, 0.45, 0.5])


@RUNNER
def test_an_image_in_either_layout_is_read_and_written_as_it_lies(runner: str) -> None:
    """Also where x_adv is x itself, and where a sample's memory is not dense."""
    x = torch.rand(2, 3, 6, 5)
    weight, radius = torch.randn(8, 3, 3, 3), torch.tensor([0.02, 0.03])
    incoming = torch.randn(2, 8, 6, 5).bfloat16()
    plain = stem_step_(x.clone(), incoming, weight, x, radius, radius / 4, 1, 1)
    for lying in (x.contiguous(memory_format=torch.channels_last), torch.rand(2, 3, 6, 9)[..., 2:7].copy_(x)):
        args = (lying, incoming, weight, lying, radius, radius / 4, 1, 1, 0.0, 1.0)
        target = lying.clone() if lying.is_contiguous(memory_format=torch.channels_last) else lying
        (found,) = outcome(STEM_STEP, (target, *args[1:3], x, *args[4:]), runner)
        assert torch.equal(found, plain)
    itself = x.clone()
    STEM_STEP.reference(itself, incoming, weight, itself, radius, radius / 4, 1, 1, 0.0, 1.0)
    assert torch.equal(itself, plain)


X, W, GRAD, BIAS = torch.ones(2, 3, 4, 4), torch.ones(5, 3, 3, 3), torch.ones(2, 5, 4, 4), torch.ones(5)


@pytest.mark.parametrize(
    ("call", "args", "error", "match"),
    [
        (stem_conv, (X[0], W), ValueError, r"x must be \(B, C, H, W\)"),
        (stem_conv, (X.bfloat16(), W), TypeError, "float32 or float64"),
        (stem_conv, (X, W.half()), ValueError, r"weight must be \(O, 3, k, k\) torch.float32"),
        (stem_conv, (X, W[:, :2]), ValueError, "weight must be"),
        (stem_conv, (X, W[..., :2]), ValueError, "weight must be"),
        (stem_conv, (X, W[0]), ValueError, "weight must be"),
        (stem_conv, (X, W, BIAS[:2]), ValueError, "bias must be"),
        (stem_conv, (X, W, BIAS, True, 0, 1), ValueError, "stride must be"),
        (stem_conv, (X, W, BIAS, True, 1.5, 1), TypeError, "stride must be an integer"),
        (stem_conv, (X, W, BIAS, True, 1, 1, torch.float32), TypeError, "dtype must be bfloat16 or float16"),
        (stem_conv, (X, W.to("meta")), ValueError, "different devices"),
        (stem_step_, (X, GRAD, W, X, 0.1, 0.1), ValueError, r"grad must be \(2, 5, 2, 2\)"),
        (stem_step_, (X, GRAD.int(), W, X, 0.1, 0.1, 1, 1), TypeError, "grad must be float32"),
        (stem_step_, (X.double(), GRAD, W, X, 0.1, 0.1, 1, 1), TypeError, "x_adv is torch.float64"),
        (stem_step_, (X, GRAD, W, X, -0.1, 0.1, 1, 1), ValueError, "radius must not be negative"),
        (stem_step_, (X[:1].expand(2, -1, -1, -1), GRAD, W, X, 0.1, 0.1, 1, 1), ValueError, "expanded"),
        (stem_step_, (X, GRAD, W, X, 0.1, 0.1, 1, 1, 1.0, 0.0), ValueError, "lo must not exceed hi"),
    ],
)
def test_refuses(call: Any, args: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(*args)
