"""The l2 attack's random start: a point uniform in each sample's l2 ball, clamped to the pixel range."""

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
)
from mwpb_kernels.op import Compile, Op, in_layout_of, tl, triton
from mwpb_kernels.philox import (
    STREAM_L2,
    STREAM_L2_RADIUS,
    normal_words,
    philox_block,
    philox_words,
    uniform_words,
)
from mwpb_kernels.strided import (
    clamp_between,
    column,
    loop_arguments,
    nonzero,
    offset_of,
    per_sample,
    pixel_range,
    rows,
    tile_of,
    tile_shape,
    widened,
)


# reference --------------------------------------------------------------------------------------------------
@torch.no_grad()
def l2_start_reference(x: Tensor, radius: Tensor, seed: Tensor, index: Tensor, lo: float, hi: float) -> Tensor:
    noise = by_element(normal_words(sample_words(x, seed, index, STREAM_L2), x.dtype), x)
    norm = rows(noise).square().sum(1).sqrt()
    u = uniform_words(philox_words(index, seed, STREAM_L2_RADIUS)[:, 0, 0], x.dtype) + 2.0**-24
    length = radius * torch.exp(torch.log(u) / max(1, x.shape[1:].numel()))
    return in_layout_of(x, torch.clamp(x + column(length / nonzero(norm), x) * noise, lo, hi))


# Triton -----------------------------------------------------------------------------------------------------
@triton.jit
def _l2_start_kernel(
    out_ptr,  # (B, ...)
    x_ptr,  # (B, ...)
    radius_ptr,  # (B,)
    seed_ptr,  # (1,) int64
    index_ptr,  # (B,) int64
    square_ptr,  # (B, blocks): sum of the squared noise; written by STAGE "norm", its total read by "write"
    n, blocks, size_1, size_2,
    out_b, out_0, out_1, out_2,
    x_b, x_0, x_1, x_2,
    radius_stride, index_stride, lo, hi,
    STREAM: tl.constexpr, STREAM_RADIUS: tl.constexpr,
    STAGE: tl.constexpr,  # "all": a sample is one tile; else "norm", then "write"
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, element, inside = tile_of(n, blocks, BLOCK)
    group = (tl.program_id(0).to(tl.int64) % blocks) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    index = tl.load(index_ptr + sample * index_stride)
    noise = tl.where(inside, normal_tile(seed_ptr, index, STREAM, group), 0.0)
    if STAGE == "write":
        square = tl.load(square_ptr + sample)
    else:
        square = tl.sum(noise * noise, 0)
    if STAGE == "norm":
        tl.store(square_ptr + tl.program_id(0).to(tl.int64), square)
    else:
        word, _, _, _ = philox_block(tl.load(seed_ptr), STREAM_RADIUS, index, index * 0)
        u = ((word >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8  # This is 2**-24.
        length = tl.load(radius_ptr + sample * radius_stride) * tl.exp(tl.log(u) / n)
        scale = length / tl.where(square == 0.0, 1.0, tl.sqrt(square))
        x_at = x_ptr + sample * x_b + offset_of(element, size_1, size_2, x_0, x_1, x_2, FLAT, WIDE)
        out_at = out_ptr + sample * out_b + offset_of(element, size_1, size_2, out_0, out_1, out_2, FLAT, WIDE)
        value = tl.load(x_at, mask=inside) + scale * noise
        tl.store(out_at, clamp_between(value, lo, hi), mask=inside)


# launchers --------------------------------------------------------------------------------------------------
def l2_start_triton(x: Tensor, radius: Tensor, seed: Tensor, index: Tensor, lo: float, hi: float) -> Tensor:
    out, target, source = start_operands(x)
    if not out.numel():
        return out
    block, warps, whole = tile_shape(x)
    grid, arguments = loop_arguments(block, logical=True, out=target, x=source)

    def launch(stage: str, square: Tensor) -> None:
        _l2_start_kernel[grid](
            radius_ptr=radius,
            seed_ptr=seed,
            index_ptr=index,
            square_ptr=square,
            radius_stride=radius.stride(0),
            index_stride=index.stride(0),
            lo=lo,
            hi=hi,
            STREAM=STREAM_L2,
            STREAM_RADIUS=STREAM_L2_RADIUS,
            STAGE=stage,
            num_warps=warps,
            **arguments,
        )

    if whole:
        launch("all", radius)
    else:
        square = radius.new_empty(x.shape[0], arguments["blocks"])
        launch("norm", square)
        launch("write", square.sum(1))
    return out if target is out else out.copy_(target)


# registration -----------------------------------------------------------------------------------------------
L2_START = Op(
    schema="l2_start(Tensor x, Tensor radius, Tensor seed, Tensor index, float lo, float hi) -> Tensor",
    reference=l2_start_reference,
    fake=start_fake,
    triton=l2_start_triton,
    samples=lambda device: ((x, 20 * r, seed, index, 0.0, 1.0) for x, r, seed, index in start_samples(device)),
    bytes_moved=start_bytes,
    compiles=tuple(
        Compile(
            kernel=_l2_start_kernel,
            signature=start_types(square_ptr="*fp32"),
            constants={
                **dict(STREAM=STREAM_L2, STREAM_RADIUS=STREAM_L2_RADIUS, STAGE=stage),
                **dict(FLAT=flat, WIDE=False, BLOCK=block),
            },
            num_warps=warps,
        )
        for stage, flat, block, warps in (
            ("all", True, 1024, 4),
            ("all", False, 4096, 16),
            ("norm", True, 4096, 16),
            ("write", False, 4096, 16),
        )
    ),
)


# public function --------------------------------------------------------------------------------------------
def l2_start(
    x: Tensor, radius: float | Tensor, seed: Tensor, index: Tensor, lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """x plus noise that is uniform in each sample's l2 ball, clamped to [lo, hi].

    The direction is that of n standard normals, the length radius * u**(1 / n) with u uniform in (0, 1], n the
    number of elements of a sample. The clamp moves every pixel towards x where x lies in [lo, hi], so the result
    stays in the ball (up to a few float roundings), but is no longer uniform there.
    x, seed, index: as `gaussian_start` takes them. radius: (B,) tensor, one l2 length a sample (not negative), or
    a number. Determinism, result and errors: as `uniform_start`. NaN in x stays NaN; a NaN radius makes its sample
    NaN. Source: Muller, "A note on a method for generating points uniformly on n-dimensional spheres", 1959.
    """
    check_start(x, seed, index)
    x = widened(x)
    lo, hi = pixel_range(lo, hi)
    return L2_START(x, per_sample(radius, x, "radius"), seed, index, lo, hi)
