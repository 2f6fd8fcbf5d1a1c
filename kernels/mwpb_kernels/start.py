"""Random start points of attacks: Gaussian or uniform noise around the images, clamped to the pixel range.

The noise is counter-based (philox.py): a function of the seed and of each sample's index, numbered by element
in the row-major order of the sample's logical shape. So it is the same in every memory layout, batch and
implementation, eager or captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mwpb_kernels.op import Compile, Op, check_device, tl, triton
from mwpb_kernels.philox import (
    STREAM_GAUSSIAN,
    STREAM_UNIFORM,
    normal_block,
    normal_words,
    philox_block,
    philox_words,
    uniform_block,
    uniform_words,
)
from mwpb_kernels.strided import (
    check_images,
    clamp_between,
    column,
    fits,
    loop_arguments,
    loop_types,
    offset_of,
    per_sample,
    tile_of,
)


# reference ---------------------------------------------------------------------------------------------------
def sample_words(x: torch.Tensor, seed: torch.Tensor, index: torch.Tensor, stream: int) -> torch.Tensor:
    """(B, groups, 4) words, one for every element of x's samples, then up to three more."""
    return philox_words(index, seed, stream, -(-x.shape[1:].numel() // 4))


def by_element(numbers: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, groups, 4) numbers in the shape of x."""
    return numbers.reshape(x.shape[0], numbers.shape[1] * 4)[:, : x.shape[1:].numel()].reshape(x.shape)


def in_layout_of(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of `values` with the strides of a new tensor like x."""
    return torch.empty_like(x).copy_(values)


@torch.no_grad()
def gaussian_start_reference(
    x: torch.Tensor, sigma: float, seed: torch.Tensor, index: torch.Tensor, lo: float, hi: float
) -> torch.Tensor:
    noise = by_element(normal_words(sample_words(x, seed, index, STREAM_GAUSSIAN), x.dtype), x)
    return in_layout_of(x, torch.clamp(x + sigma * noise, lo, hi))


@torch.no_grad()
def uniform_start_reference(
    x: torch.Tensor, radius: torch.Tensor, seed: torch.Tensor, index: torch.Tensor, lo: float, hi: float
) -> torch.Tensor:
    noise = by_element(2 * uniform_words(sample_words(x, seed, index, STREAM_UNIFORM), x.dtype) - 1, x)
    return in_layout_of(x, torch.clamp(x + column(radius, x) * noise, lo, hi))


# Triton ------------------------------------------------------------------------------------------------------
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


@triton.jit
def _start_kernel(
    out_ptr,  # (B, ...)
    x_ptr,  # (B, ...)
    radius_ptr,  # (B,), uniform noise only
    seed_ptr,  # (1,) int64
    index_ptr,  # (B,) int64
    n,
    blocks,
    size_1,
    size_2,
    out_b,
    out_0,
    out_1,
    out_2,
    x_b,
    x_0,
    x_1,
    x_2,
    radius_stride,
    index_stride,
    sigma,
    lo,
    hi,
    GAUSSIAN: tl.constexpr,
    STREAM: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, element, inside = tile_of(n, blocks, BLOCK)
    group = (tl.program_id(0).to(tl.int64) % blocks) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    index = tl.load(index_ptr + sample * index_stride)
    if GAUSSIAN:
        noise = normal_tile(seed_ptr, index, STREAM, group)
        scale = sigma
    else:
        noise = symmetric_tile(seed_ptr, index, STREAM, group)
        scale = tl.load(radius_ptr + sample * radius_stride)
    x_at = x_ptr + sample * x_b + offset_of(element, size_1, size_2, x_0, x_1, x_2, FLAT, WIDE)
    out_at = out_ptr + sample * out_b + offset_of(element, size_1, size_2, out_0, out_1, out_2, FLAT, WIDE)
    value = tl.load(x_at, mask=inside) + scale * noise
    tl.store(out_at, clamp_between(value, lo, hi), mask=inside)


# launchers ---------------------------------------------------------------------------------------------------
def start_operands(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, and the tensors that a kernel writes and reads in its place where dimensions are too many."""
    out = torch.empty_like(x)
    if fits(out, x, logical=True):
        return out, out, x
    return out, torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()


def _launch_start(
    x: torch.Tensor,
    radius: torch.Tensor | None,
    sigma: float,
    seed: torch.Tensor,
    index: torch.Tensor,
    lo: float,
    hi: float,
) -> torch.Tensor:
    out, target, source = start_operands(x)
    if out.numel():
        grid, arguments = loop_arguments(1024, logical=True, out=target, x=source)
        _start_kernel[grid](
            radius_ptr=index if radius is None else radius,
            seed_ptr=seed,
            index_ptr=index,
            radius_stride=0 if radius is None else radius.stride(0),
            index_stride=index.stride(0),
            sigma=sigma,
            lo=lo,
            hi=hi,
            GAUSSIAN=radius is None,
            STREAM=STREAM_GAUSSIAN if radius is None else STREAM_UNIFORM,
            enable_fp_fusion=False,  # radius * noise rounds before the sum, as in the reference
            **arguments,
        )
    return out if target is out else out.copy_(target)


def gaussian_start_triton(
    x: torch.Tensor, sigma: float, seed: torch.Tensor, index: torch.Tensor, lo: float, hi: float
) -> torch.Tensor:
    return _launch_start(x, None, sigma, seed, index, lo, hi)


def uniform_start_triton(
    x: torch.Tensor, radius: torch.Tensor, seed: torch.Tensor, index: torch.Tensor, lo: float, hi: float
) -> torch.Tensor:
    return _launch_start(x, radius, 0.0, seed, index, lo, hi)


# registration ------------------------------------------------------------------------------------------------
def start_samples(device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
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


def start_fake(
    x: torch.Tensor,
    scale: float | torch.Tensor,
    seed: torch.Tensor,
    index: torch.Tensor,
    lo: float,
    hi: float,
) -> torch.Tensor:
    """A new tensor like x."""
    return torch.empty_like(x)


def start_bytes(x: torch.Tensor, *others: Any) -> int:
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


GAUSSIAN_START = Op(
    schema="gaussian_start(Tensor x, float sigma, Tensor seed, Tensor index, float lo, float hi) -> Tensor",
    reference=gaussian_start_reference,
    fake=start_fake,
    triton=gaussian_start_triton,
    samples=lambda device: ((x, 0.05, seed, index, 0.0, 1.0) for x, _, seed, index in start_samples(device)),
    bytes_moved=start_bytes,
    compiles=tuple(
        Compile(
            kernel=_start_kernel,
            signature=start_types(radius_ptr="*i64", sigma="fp32"),
            constants={"GAUSSIAN": True, "STREAM": STREAM_GAUSSIAN, "FLAT": flat, "WIDE": wide, "BLOCK": 1024},
        )
        for flat, wide in ((True, False), (False, False), (False, True))
    ),
)
UNIFORM_START = Op(
    schema="uniform_start(Tensor x, Tensor radius, Tensor seed, Tensor index, float lo, float hi) -> Tensor",
    reference=uniform_start_reference,
    fake=start_fake,
    triton=uniform_start_triton,
    samples=lambda device: ((*sample, 0.0, 1.0) for sample in start_samples(device)),
    bytes_moved=start_bytes,
    compiles=tuple(
        Compile(
            kernel=_start_kernel,
            signature=start_types(sigma="fp32"),
            constants={"GAUSSIAN": False, "STREAM": STREAM_UNIFORM, "FLAT": flat, "WIDE": False, "BLOCK": 1024},
        )
        for flat in (True, False)
    ),
)


# public functions --------------------------------------------------------------------------------------------
def check_start(x: torch.Tensor, seed: torch.Tensor, index: torch.Tensor, lo: float, hi: float) -> None:
    """Refuse what no start can take, from metadata alone."""
    check_images(x, lo, hi)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed must be an int64 tensor with one element, not {seed.dtype} {tuple(seed.shape)}")
    if index.dtype != torch.int64 or index.shape != x.shape[:1]:
        raise TypeError(f"index must be ({x.shape[0]},) int64, not {index.dtype} {tuple(index.shape)}")
    check_device(x, seed, index)


def gaussian_start(
    x: torch.Tensor,
    sigma: float,
    seed: torch.Tensor,
    index: torch.Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
) -> torch.Tensor:
    """clamp(x + sigma * N(0, 1), lo, hi): the start of TRADES, MART and MWPB.

    x: (B, ...) float32 or float64, any strides. sigma: standard deviation in the images' units, not negative.
    seed: one-element int64 tensor on x's device; read there, so a captured CUDA graph sees its changes. index:
    (B,) int64, each sample's index in its data set. lo, hi: the pixel range.
    Returns a new tensor with x's layout and type; no gradient flows through it. The noise of an element depends
    on seed, index and the element's row-major place in its sample alone: its bits come from the same Philox
    words everywhere, the normals are equal up to the rounding of log, sine and cosine, and lie within ±5.77.
    NaN in x stays NaN. Raises ValueError or TypeError for other shapes, types or devices, a negative sigma and
    lo > hi. Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", 2019.
    """
    check_start(x, seed, index, lo, hi)
    if not sigma >= 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    return GAUSSIAN_START(x, float(sigma), seed, index, lo, hi)


def uniform_start(
    x: torch.Tensor,
    radius: float | torch.Tensor,
    seed: torch.Tensor,
    index: torch.Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
) -> torch.Tensor:
    """clamp(x + radius * U[-1, 1), lo, hi): the uniform start of PGD in the l_inf ball.

    radius: (B,) tensor, one value a sample (not negative; not checked, to avoid synchronisation), or a number.
    The other arguments, the result and the errors: as `gaussian_start`. The noise has multiples of 2**-23 and is
    bit-equal on every implementation; |result - x| <= radius up to the rounding of the sum. NaN in x or radius
    gives NaN. Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018.
    """
    check_start(x, seed, index, lo, hi)
    return UNIFORM_START(x, per_sample(radius, x, "radius"), seed, index, lo, hi)
