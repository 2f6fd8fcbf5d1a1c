"""What the random start points share: noise by element, its Triton tiles, their operands, samples and checks.

The noise is counter-based (philox.py): a function of the seed and of each sample's index, numbered by element
in the row-major order of the sample's logical shape. So it is the same in every memory layout, batch and
implementation, eager or captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import check_device, check_tensors, tl, triton
from mwpb_kernels.philox import normal_block, philox_block, philox_words, uniform_block
from mwpb_kernels.strided import check_images, fits, loop_types


# reference --------------------------------------------------------------------------------------------------
def sample_words(x: Tensor, seed: Tensor, index: Tensor, stream: int) -> Tensor:
    """(B, groups, 4) words, one for every element of x's samples, then up to three more."""
    return philox_words(index, seed, stream, -(-x.shape[1:].numel() // 4))


def by_element(numbers: Tensor, x: Tensor) -> Tensor:
    """(B, groups, 4) numbers in the shape of x."""
    return numbers.reshape(x.shape[0], numbers.shape[1] * 4)[:, : x.shape[1:].numel()].reshape(x.shape)


# Triton -----------------------------------------------------------------------------------------------------
@triton.jit
def normal_tile(seed_ptr, index, stream, group):
    """Standard normals of int64 groups, four a group, in the order of the elements."""
    w0, w1, w2, w3 = philox_block(tl.load(seed_ptr), stream, index, group)
    n0, n1 = normal_block(w0, w1)
    n2, n3 = normal_block(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def symmetric_tile(seed_ptr, index, stream, group):
    """Numbers uniform in [-1, 1) of int64 groups, four a group, in the order of the elements; exact."""
    w0, w1, w2, w3 = philox_block(tl.load(seed_ptr), stream, index, group)
    even = tl.interleave(uniform_block(w0), uniform_block(w2))
    odd = tl.interleave(uniform_block(w1), uniform_block(w3))
    return tl.interleave(even, odd) * 2.0 - 1.0


# launchers --------------------------------------------------------------------------------------------------
def start_operands(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the tensors that a kernel writes and reads in its place where dimensions are too many."""
    out = torch.empty_like(x)
    if fits(out, x, logical=True):
        return out, out, x
    return out, torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()


# registration -----------------------------------------------------------------------------------------------
def start_samples(device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Images, radius, seed and index: empty, one element, odd sizes, CIFAR's shape, large indices and seeds."""
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, seed, first in (
        ((0, 3, 4, 4), torch.float32, 1, 0),
        ((2, 0), torch.float32, 1, 0),
        ((1,), torch.float32, 2, 7),
        ((3, 1, 5, 7), torch.float32, 0x123456789ABCDEF, 2**32 - 2),
        ((5, 33), torch.float32, -(2**63), 0),
        ((2, 3, 5, 2, 3), torch.float32, 3, 2**40),
        ((3, 2, 3, 5), torch.float64, 4, 11),
        ((128, 3, 32, 32), torch.float32, 5, 49_000),
        ((2, 3, 53, 67), torch.float32, 6, 1),
    ):
        x = torch.rand(shape, generator=generator, dtype=dtype)
        if len(shape) == 4:  # the layout that training uses
            x = x.contiguous(memory_format=torch.channels_last)
        radius = torch.linspace(0.01, 0.06, shape[0], dtype=dtype)
        index = torch.arange(first, first + shape[0])
        yield x.to(device), radius.to(device), torch.tensor([seed], device=device), index.to(device)


def start_fake(x: Tensor, scale: float | Tensor, seed: Tensor, index: Tensor, lo: float, hi: float) -> Tensor:
    """A new tensor like x."""
    return torch.empty_like(x)


def start_bytes(x: Tensor, *others: Any) -> int:
    """x read, as much written."""
    return 2 * x.numel() * x.element_size()


def start_types(**pointers: str) -> dict[str, str]:
    """Ahead-of-time types of a kernel that adds noise to x."""
    return {
        **loop_types(out="fp32", x="fp32"),
        **dict(radius_ptr="*fp32", seed_ptr="*i64", index_ptr="*i64", radius_stride="i32", index_stride="i32"),
        **dict(lo="fp32", hi="fp32"),
        **pointers,
    }


# checks -----------------------------------------------------------------------------------------------------
def check_start(x: Tensor, seed: Tensor, index: Tensor) -> None:
    """Refuse what no start can take, from metadata alone."""
    check_images(x)
    check_tensors(seed=seed, index=index)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed must be an int64 tensor with one element, not {seed.dtype} {tuple(seed.shape)}")
    if index.dtype != torch.int64 or index.shape != x.shape[:1]:
        raise TypeError(f"index must be ({x.shape[0]},) int64, not {index.dtype} {tuple(index.shape)}")
    check_device(x, seed, index)
