"""stem.py's ops in plain PyTorch, the shapes that they give, and the cases that they are tested with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from mwpb_kernels.bias_add_relu import cycled, pack
from mwpb_kernels.conv_reference import (
    conv_input_grad_reference,
    images_like,
    products,
    rounded,
    size_after,
    slices,
)
from mwpb_kernels.linf import linf_step_reference


# reference ---------------------------------------------------------------------------------------------------
def parts(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` rounded to that type, and so what the rounding has left; both in the type of `values`."""
    high = values.to(dtype).to(values.dtype)
    return high, (values - high).to(dtype).to(values.dtype)


@torch.no_grad()
def stem_conv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, gate = stem_conv_fake(x, weight, bias, relu, stride, padding, dtype)
    if not out.numel():
        return out, gate
    if several := slices(x.shape[0], 3 * weight[0].numel() * out.shape[2] * out.shape[3]):
        for s in several:
            out[s], gate[s] = stem_conv_reference(x[s], weight, bias, relu, stride, padding, dtype)
        return out, gate
    if x.dtype != torch.float64:
        (high, low), (most, rest) = parts(x, torch.bfloat16), parts(weight, torch.bfloat16)
        x, weight = torch.cat((low, high, high), 1), torch.cat((most, rest, most), 1)
    sums = products(x, weight, stride, padding)
    sums = sums if bias is None else sums + bias[:, None, None]
    out = rounded(torch.relu(sums) if relu else sums, dtype)
    return out, pack(~(out <= 0)) if relu else gate


@torch.no_grad()
def stem_step_reference(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    radius: torch.Tensor,
    step_size: torch.Tensor,
    stride: int,
    padding: int,
    lo: float,
    hi: float,
) -> None:
    kind, height, width = x.dtype, *x.shape[2:]
    if several := slices(x.shape[0], weight[:, 0].numel() * height * width):
        for s in several:
            of_part = (x_adv[s], grad[s], weight, x[s], radius[s], step_size[s])
            stem_step_reference(*of_part, stride, padding, lo, hi)
        return

    def input_grad(weight: torch.Tensor) -> torch.Tensor:
        return conv_input_grad_reference(grad.to(kind), weight, None, None, stride, padding, height, width)

    if grad.dtype in (torch.bfloat16, torch.float16) and kind != torch.float64:
        high, low = parts(weight, grad.dtype)
        gradient = input_grad(high) + input_grad(low)
    else:
        gradient = input_grad(weight)
    # where alone PyTorch lets them be written
    with torch.inference_mode() if x_adv.is_inference() else contextlib.nullcontext():
        linf_step_reference(x_adv, gradient, x, radius, step_size, lo, hi)


# shapes ------------------------------------------------------------------------------------------------------
def stem_conv_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = [size_after(n, weight.shape[2], stride, padding) for n in x.shape[2:]]
    groups = (weight.shape[0] + 7) // 8 if relu else 0
    gate = x.new_empty((x.shape[0], *sizes, groups), dtype=torch.uint8)
    return images_like(x, x.shape[0], weight.shape[0], *sizes, dtype=dtype), gate


# samples -----------------------------------------------------------------------------------------------------
SHAPES = (  # of the images; outputs, kernel, stride
    ((0, 3, 4, 4), 5, 3, 1),
    ((1, 1, 1, 1), 1, 1, 1),
    ((2, 3, 5, 4), 8, 3, 1),
    ((3, 1, 5, 3), 33, 1, 2),
    ((2, 5, 7, 6), 9, 2, 2),
    ((2, 3, 4, 6), 16, 1, 3),
    ((4, 3, 8, 8), 64, 3, 1),
)
HALVES = (torch.bfloat16, torch.float16)


def _eighths(generator: torch.Generator, *size: int, least: int = -8) -> torch.Tensor:
    """Sums of their products are exact in any order, and so are gates and signs."""
    return torch.randint(least, 9, size, generator=generator) / 8


def stem_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """x, weight, bias, relu, stride, padding and type: with and without what is optional, and in float64."""
    generator = torch.Generator().manual_seed(0)
    for number, (shape, outputs, kernel, stride) in enumerate((*SHAPES, SHAPES[2])):
        kind = torch.float32 if number < len(SHAPES) else torch.float64
        x = _eighths(generator, *shape, least=0).to(device, kind).contiguous(memory_format=torch.channels_last)
        weight = _eighths(generator, outputs, shape[1], kernel, kernel).to(device, kind)
        bias = None if number % 3 == 1 else _eighths(generator, outputs).to(device, kind)
        yield x, weight, bias, number % 4 != 3, stride, kernel // 2, HALVES[number % 2]


def stem_step_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """x_adv, gradient, weight, x, radius, step and geometry; gradients of all types."""
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, *HALVES, torch.bfloat16, torch.float32, *HALVES, torch.float64)
    for kind, (shape, outputs, kernel, stride) in zip(kinds, (*SHAPES, SHAPES[2]), strict=True):
        image = torch.float64 if kind == torch.float64 else torch.float32
        weight = _eighths(generator, outputs, shape[1], kernel, kernel).to(device, image)
        sizes = [size_after(n, kernel, stride, kernel // 2) for n in shape[2:]]
        grad = _eighths(generator, shape[0], outputs, *sizes).to(device, kind)
        x = torch.rand(shape, generator=generator, dtype=image)
        x_adv = (x + 0.05 * torch.randn(shape, generator=generator, dtype=image)).clamp(0, 1)
        images = [t.to(device).contiguous(memory_format=torch.channels_last) for t in (x_adv, grad, x)]
        radius = torch.linspace(0.01, 0.06, shape[0], dtype=image, device=device)
        yield images[0], images[1], weight, images[2], radius, radius / 4, stride, kernel // 2, 0.0, 1.0


def _square(weight: torch.Tensor, padding: int, channels: int) -> torch.Tensor:
    return cycled(weight, (weight.shape[0], channels, 2 * padding + 1, 2 * padding + 1))


def stem_fit(
    x: Any, weight: Any, bias: Any, relu: bool, stride: int, padding: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments of any sizes, made to go together."""
    weight = _square(weight, padding, x.shape[1])
    return x, weight, None if bias is None else cycled(bias, weight.shape[:1]), relu, stride, padding, dtype


def stem_step_fit(
    x_adv: Any, grad: Any, weight: Any, x: Any, radius: Any, step: Any, stride: int, padding: int, *ends: float
) -> tuple[Any, ...]:
    """As stem_fit."""
    weight, shape = _square(weight, padding, x.shape[1]), x.shape
    sizes = [size_after(n, weight.shape[2], stride, padding) for n in shape[2:]]
    grad = cycled(grad, (shape[0], weight.shape[0], *sizes))
    of_samples = (cycled(t, shape[:1]) for t in (radius, step))
    return cycled(x_adv, shape), grad, weight, x, *of_samples, stride, padding, *ends
