"""batch_norm_relu.py's ops in plain PyTorch, the shapes that they give, and the cases that they are tested on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.bias_add_relu import pack, unpack
from mwpb_kernels.op import compute_dtype, in_layout_of
from mwpb_kernels.scale_bias_relu import by_channel, lying_as


# reference ---------------------------------------------------------------------------------------------------
def batch_norm_relu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    skip: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide, dims = x.to(compute_dtype(x.dtype)), _but_channels(x)
    count = x.numel() // max(1, x.shape[1])
    mean = wide.mean(dims)
    mean = mean + (wide - by_channel(mean, x)).mean(dims)  # what it lost to rounding; and NaN where it is infinite
    centred = wide - by_channel(mean, x)
    squares = centred.square().sum(dims)
    invstd = (squares / count + eps).rsqrt()
    sums = centred * by_channel(invstd * weight, x) + by_channel(bias, x)
    out = in_layout_of(x, torch.relu(sums if skip is None else sums + skip))
    new_mean = (1 - momentum) * running_mean + momentum * mean
    new_var = (1 - momentum) * running_var + momentum * (squares / (count - 1))
    constants = (mean, invstd, pack(~(out.detach() <= 0)), new_mean, new_var)
    return out, *(t.detach() for t in constants)  # type: ignore[return-value]


@torch.no_grad()
def batch_norm_relu_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, gate: Tensor, skipped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dims, count = _but_channels(x), x.numel() // max(1, x.shape[1])
    passed = torch.where(unpack(gate, x.shape[1]), grad, 0).to(compute_dtype(x.dtype))
    centred = x.to(passed.dtype) - by_channel(mean, x)
    of_weight, of_bias = (passed * centred).sum(dims) * invstd, passed.sum(dims)
    normed = centred * by_channel(invstd, x)
    of_x = passed - by_channel(of_bias / count, x) - normed * by_channel(of_weight / count, x)
    of_skip = in_layout_of(x, passed) if skipped else x.new_empty(0)
    return in_layout_of(x, of_x * by_channel(weight * invstd, x)), of_weight, of_bias, of_skip


def _but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


# shapes and cases --------------------------------------------------------------------------------------------
def norm_fake(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate = x.new_empty((x.shape[0], *x.shape[2:], (x.shape[1] + 7) // 8), dtype=torch.uint8)
    mean, invstd, new_mean, new_var = (x.new_empty(x.shape[1], dtype=compute_dtype(x.dtype)) for _ in range(4))
    return torch.empty_like(x), mean, invstd, gate, new_mean, new_var


def backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, gate: Tensor, skipped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_weight, of_bias = (x.new_empty(x.shape[1], dtype=compute_dtype(x.dtype)) for _ in range(2))
    return torch.empty_like(x), of_weight, of_bias, torch.empty_like(x) if skipped else x.new_empty(0)


def norm_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """No channels, a batch of one, one position, odd sizes, all types, a ResNet's shape; one in three without a
    skip. The means are off zero, as those of a convolution's results are."""
    generator = torch.Generator().manual_seed(0)
    for place, (shape, dtype) in enumerate(
        (
            ((2, 3, 5, 7), torch.float32),
            ((3, 0, 4, 4), torch.float32),
            ((5, 33), torch.float32),
            ((1, 9, 5, 3), torch.bfloat16),
            ((17, 5, 1, 1), torch.float32),
            ((2, 6, 3, 5), torch.float16),
            ((2, 3, 2, 3, 5), torch.float32),
            ((3, 4, 5, 2), torch.float64),
            ((7, 64, 8, 8), torch.bfloat16),
            ((2, 3, 53, 67), torch.float32),
            ((128, 64, 8, 8), torch.bfloat16),
        )
    ):
        x, skip = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        if len(shape) == 4:  # the layout that training uses
            x = x.contiguous(memory_format=torch.channels_last)
        draw = torch.rand(5, shape[1], generator=generator, dtype=torch.float64).to(compute_dtype(dtype))
        weight, bias, mean, var = 0.5 + draw[0], draw[1] - 0.5, draw[2], 0.5 + draw[3]
        x = x + by_channel(4 * draw[4] - 2, x).to(dtype)
        found = (x, weight, bias, mean, var, None if place % 3 == 2 else lying_as(skip, x))
        # over one position a batch in which all images are the same would have no variance at all
        eps = 1e-5 if torch.Size(shape[2:]).numel() > 1 else 0.1
        yield *(t if t is None else t.to(device) for t in found), 0.1, eps


def backward_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Of every sample of the forward op; every other gradient in x's layout."""
    for place, args in enumerate(norm_samples(device)):
        (_, mean, invstd, gate, *_), x = batch_norm_relu_reference(*args), args[0]
        grad = torch.linspace(-1, 2, x.numel(), device=device).to(x.dtype).view(x.shape)
        yield lying_as(grad, x) if place % 2 else grad, x, args[1], mean, invstd, gate, args[5] is not None
