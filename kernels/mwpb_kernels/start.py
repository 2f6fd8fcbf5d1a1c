"""Random start points of attacks: Gaussian or uniform noise around the images, clamped to the pixel range."""

from __future__ import annotations

import torch
from torch import Tensor

from mwpb_kernels.noise import (
    by_element,
    check_start,
    normal_tile,
    sample_words,
    start_bytes,
    start_fake,
    start_operands,
    start_samples,
    start_types,
    symmetric_tile,
)
from mwpb_kernels.op import Compile, Op, in_layout_of, number, tl, triton
from mwpb_kernels.philox import STREAM_GAUSSIAN, STREAM_UNIFORM, normal_words, uniform_words
from mwpb_kernels.strided import (
    clamp_between,
    column,
    loop_arguments,
    offset_of,
    per_sample,
    pixel_range,
    tile_of,
    widened,
)


# reference ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def gaussian_start_reference(x: Tensor, sigma: float, seed: Tensor, index: Tensor, lo: float, hi: float) -> Tensor:
    noise = by_element(normal_words(sample_words(x, seed, index, STREAM_GAUSSIAN), x.dtype), x)
    return in_layout_of(x, torch.clamp(x + sigma * noise, lo, hi))


@torch.no_grad()
def uniform_start_reference(
    x: Tensor, radius: Tensor, seed: Tensor, index: Tensor, lo: float, hi: float
) -> Tensor:
    noise = by_element(2 * uniform_words(sample_words(x, seed, index, STREAM_UNIFORM), x.dtype) - 1, x)
    return in_layout_of(x, torch.clamp(x + column(radius, x) * noise, lo, hi))


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _start_kernel(
    out_ptr,  # (B, ...)
    x_ptr,  # (B, ...)
    radius_ptr,  # (B,), uniform noise only
    seed_ptr,  # (1,) int64
    index_ptr,  # (B,) int64
    n, blocks, size_1, size_2,
    out_b, out_0, out_1, out_2,
    x_b, x_0, x_1, x_2,
    radius_stride, index_stride, sigma, lo, hi,
    GAUSSIAN: tl.constexpr, STREAM: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
def _launch_start(
    x: Tensor, radius: Tensor | None, sigma: float, seed: Tensor, index: Tensor, lo: float, hi: float
) -> Tensor:
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


def gaussian_start_triton(x: Tensor, sigma: float, seed: Tensor, index: Tensor, lo: float, hi: float) -> Tensor:
    return _launch_start(x, None, sigma, seed, index, lo, hi)


def uniform_start_triton(x: Tensor, radius: Tensor, seed: Tensor, index: Tensor, lo: float, hi: float) -> Tensor:
    return _launch_start(x, radius, 0.0, seed, index, lo, hi)


# registration ------------------------------------------------------------------------------------------------
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
def gaussian_start(
    x: Tensor, sigma: float, seed: Tensor, index: Tensor, lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """clamp(x + sigma * N(0, 1), lo, hi): the start of TRADES, MART and MWPB.

    x: (B, ...) float32, bfloat16, float16 or float64, any strides. sigma: standard deviation in the images' units,
    not negative. seed: one-element int64 tensor on x's device; read there, so a captured CUDA graph sees its
    changes. index: (B,) int64, each sample's index in its data set. lo, hi: the pixel range.
    Returns a new tensor with x's layout and type, float32 where that is a half type, which would round the noise
    away; no gradient flows through it. The noise of an element depends
    on seed, index and the element's row-major place in its sample alone: its bits come from the same Philox
    words everywhere, the normals are equal up to the rounding of log, sine and cosine, and lie within ±5.77.
    NaN in x stays NaN. Raises ValueError or TypeError for other shapes, types or devices, a negative sigma and
    lo > hi. Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", 2019.
    """
    check_start(x, seed, index)
    x = widened(x)
    lo, hi = pixel_range(lo, hi)
    sigma = number(sigma, "sigma")
    if not sigma >= 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    return GAUSSIAN_START(x, sigma, seed, index, lo, hi)


def uniform_start(
    x: Tensor, radius: float | Tensor, seed: Tensor, index: Tensor, lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """clamp(x + radius * U[-1, 1), lo, hi): the uniform start of PGD in the l_inf ball.

    radius: (B,) tensor, one value a sample (not negative; not checked, to avoid synchronisation), or a number.
    The other arguments, the result and the errors: as `gaussian_start`. The noise has multiples of 2**-23 and is
    bit-equal on every implementation; |result - x| <= radius up to the rounding of the sum. NaN in x or radius
    gives NaN. Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018.
    """
    check_start(x, seed, index)
    x = widened(x)
    lo, hi = pixel_range(lo, hi)
    return UNIFORM_START(x, per_sample(radius, x, "radius"), seed, index, lo, hi)
