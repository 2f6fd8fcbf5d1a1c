"""conv.py's ops in plain PyTorch, the shapes that they give, and the cases that they are tested with.

One matrix product over all taps, in which padding is multiplied as the zeros that it is, of so many images at once
that there is room for the columns, which are as many times the images as there are taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from mwpb_kernels.bias_add_relu import cycled, pack, unpack
from mwpb_kernels.op import compute_dtype
from mwpb_kernels.transforms import transformed

AT_ONCE = 2**28  # elements of columns


# reference ---------------------------------------------------------------------------------------------------
def products(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    """The convolution as a matrix product over all taps: padding is multiplied as the zeros that it is."""
    kind = compute_dtype(x.dtype)
    height, width = (size_after(n, k, stride, padding) for n, k in zip(x.shape[2:], weight.shape[2:], strict=True))
    columns = F.unfold(x.to(kind), weight.shape[2:], padding=padding, stride=stride)
    return (weight.to(kind).flatten(1) @ columns).view(x.shape[0], weight.shape[0], height, width)


def slices(images: int, each: int) -> list[slice]:
    """A batch in slices of AT_ONCE elements of columns, of which an image has `each`; none where one is enough."""
    count = max(1, AT_ONCE // max(1, each))
    return [slice(first, first + count) for first in range(0, images, count)] if images > count else []


@torch.no_grad()
def conv_relu_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor | None, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    out, gate = conv_relu_fake(x, weight, bias, skip, stride, padding)
    if not out.numel():
        return out, gate
    if several := slices(x.shape[0], weight[0].numel() * out.shape[2] * out.shape[3]):
        for s in several:
            more = None if skip is None else skip[s]
            out[s], gate[s] = conv_relu_reference(x[s], weight, bias, more, stride, padding)
        return out, gate
    sums = products(x, weight, stride, padding) + bias[:, None, None]
    out = rounded(torch.relu(sums if skip is None else sums + skip), x.dtype)
    return out, pack(~(out <= 0))


@torch.no_grad()
def conv_input_grad_reference(
    grad: torch.Tensor,
    weight: torch.Tensor,
    other: torch.Tensor | None,
    gate: torch.Tensor | None,
    stride: int,
    padding: int,
    height: int,
    width: int,
) -> torch.Tensor:
    out = conv_input_grad_fake(grad, weight, other, gate, stride, padding, height, width)
    if not out.numel():
        return out
    if several := slices(grad.shape[0], weight[:, 0].numel() * height * width):
        for s in several:
            more, is_open = (None if t is None else t[s] for t in (other, gate))
            out[s] = conv_input_grad_reference(grad[s], weight, more, is_open, stride, padding, height, width)
        return out
    # the gradients stand stride apart, in zeros, so that turned weights see each of them
    apart = [n + k - 1 for n, k in zip((height, width), weight.shape[2:], strict=True)]
    spread = grad.new_zeros(*grad.shape[:2], *apart, dtype=compute_dtype(grad.dtype))
    first = [k - 1 - padding for k in weight.shape[2:]]
    ends = [f + stride * (n - 1) + 1 for f, n in zip(first, grad.shape[2:], strict=True)]
    spread[:, :, first[0] : ends[0] : stride, first[1] : ends[1] : stride] = grad
    sums = products(spread, weight.flip(2, 3).transpose(0, 1), 1, 0)
    sums = sums if other is None else sums + other
    return rounded(sums if gate is None else torch.where(unpack(gate, sums.shape[1]), sums, 0), grad.dtype)


def rounded(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In that type and in channels-last memory, as a kernel gives it; within a transform, as it lies."""
    return sums.to(dtype) if transformed() else images_like(sums, *sums.shape, dtype=dtype).copy_(sums)


# shapes ------------------------------------------------------------------------------------------------------
def size_after(n: int, kernel: int, stride: int, padding: int) -> int:
    return (n + 2 * padding - kernel) // stride + 1


def images_like(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    kind = like.dtype if dtype is None else dtype
    return torch.empty(shape, dtype=kind, device=like.device, memory_format=torch.channels_last)


def conv_relu_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor | None, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = [size_after(n, k, stride, padding) for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    out = images_like(x, x.shape[0], weight.shape[0], *sizes)
    return out, x.new_empty((x.shape[0], *sizes, (weight.shape[0] + 7) // 8), dtype=torch.uint8)


def conv_input_grad_fake(
    grad: torch.Tensor,
    weight: torch.Tensor,
    other: torch.Tensor | None,
    gate: torch.Tensor | None,
    stride: int,
    padding: int,
    height: int,
    width: int,
) -> torch.Tensor:
    return images_like(grad, grad.shape[0], weight.shape[1], height, width)


# samples -----------------------------------------------------------------------------------------------------
def conv_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """x, weight, bias, skip, stride and padding: empty, 3x3 and 1x1, strided, odd channels, all types. Eighths, so
    that every sum is exact and no order of it opens another gate."""
    generator = torch.Generator().manual_seed(0)
    for number, (shape, outputs, kernel, stride, dtype) in enumerate(
        (
            ((0, 3, 4, 4), 5, 3, 1, torch.float32),
            ((1, 1, 1, 1), 1, 1, 1, torch.float32),
            ((2, 3, 5, 4), 8, 3, 1, torch.bfloat16),
            ((3, 17, 5, 3), 33, 1, 2, torch.float16),
            ((2, 16, 7, 6), 9, 3, 2, torch.float32),
            ((2, 9, 4, 6), 16, 1, 1, torch.bfloat16),
            ((2, 3, 4, 5), 6, 3, 1, torch.float64),
            ((4, 64, 8, 8), 64, 3, 1, torch.bfloat16),
            ((2, 4, 3, 3), 5, 3, 1, torch.float32),
        )
    ):

        def eighths(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (torch.randint(-8, 9, size, generator=generator) / 8).to(device, dtype)

        x = eighths(*shape).contiguous(memory_format=torch.channels_last)
        weight = eighths(outputs, shape[1], kernel, kernel).contiguous(memory_format=torch.channels_last)
        bias, padding = eighths(outputs, dtype=compute_dtype(dtype)), kernel // 2
        sizes = [size_after(n, kernel, stride, padding) for n in shape[2:]]
        skip = None if number % 4 == 1 else eighths(shape[0], outputs, *sizes)
        yield x, weight, bias, skip, stride, padding


def grad_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Gradient, weight, other, gate and geometry, for every sample of the forward op."""
    for x, weight, bias, skip, stride, padding in conv_samples(device):
        out, _ = conv_relu_reference(x, weight, bias, skip, stride, padding)
        other, gate = (None, None) if skip is None else (x, pack(x.flip(1) > 0))
        yield (out / 8).to(x.dtype), weight, other, gate, stride, padding, *x.shape[2:]


def _square(weight: torch.Tensor, padding: int) -> torch.Tensor:
    return cycled(weight, (*weight.shape[:2], 2 * padding + 1, 2 * padding + 1))


def conv_fit(x: Any, weight: Any, bias: Any, skip: Any, stride: int, padding: int) -> tuple[Any, ...]:
    """Arguments of any sizes, made to go together."""
    weight = _square(weight, padding)
    shape = conv_relu_fake(x, weight, bias, skip, stride, padding)[0].shape
    return x, weight, bias, None if skip is None else cycled(skip, shape), stride, padding


def grad_fit(
    grad: Any, weight: Any, other: Any, gate: Any, stride: int, padding: int, *size: int
) -> tuple[Any, ...]:
    """As conv_fit."""
    weight, size = _square(weight, padding), tuple(stride * (n - 1) + 1 for n in grad.shape[2:])
    shape = (grad.shape[0], weight.shape[1], *size)
    if other is not None:
        other, gate = cycled(other, shape), cycled(gate, (shape[0], *size, -(-shape[1] // 8)))
    return grad, weight, other, gate, stride, padding, *size
