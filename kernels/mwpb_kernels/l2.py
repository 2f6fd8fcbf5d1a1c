"""The l2 counterparts: the attack step with the gradient's norm and the projection in one op, and the start.

x_adv <- clamp(project(x_adv + step_size * grad / |grad|), lo, hi), where project scales the difference from x down
to each sample's own radius. Norms are taken of values divided by the largest one, so that neither tiny nor
huge gradients under- or overflow.
"""

from __future__ import annotations

import torch

from mwpb_kernels.linf import step_bytes, step_fake, step_samples
from mwpb_kernels.op import Compile, Op, compute_dtype, tl, triton
from mwpb_kernels.philox import (
    STREAM_L2,
    STREAM_L2_RADIUS,
    normal_words,
    philox_block,
    philox_words,
    uniform_words,
)
from mwpb_kernels.start import (
    by_element,
    check_start,
    in_layout_of,
    normal_tile,
    sample_words,
    start_bytes,
    start_fake,
    start_operands,
    start_samples,
    start_types,
)
from mwpb_kernels.strided import (
    check_step,
    clamp_between,
    column,
    fits,
    loop_arguments,
    loop_types,
    mark_written,
    offset_of,
    per_sample,
    tile_of,
)

MAX_TILE = 4096  # elements that one program holds: 8 a thread, as more would spill in the strided kernels


# reference ---------------------------------------------------------------------------------------------------
def rows(t: torch.Tensor) -> torch.Tensor:
    """(B, ...) as (B, n)."""
    return t.flatten(1) if t.dim() > 1 else t[:, None]


def scale_and_root(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of every sample as two factors (B, 1): the largest magnitude, and the norm of what that leaves."""
    scale = rows(t).abs().amax(1, keepdim=True)
    return scale, (rows(t) / nonzero(scale)).square().sum(1, keepdim=True).sqrt()


def nonzero(t: torch.Tensor) -> torch.Tensor:
    """1 in the place of 0, as a divisor of what is 0 too."""
    return torch.where(t == 0, 1, t)


@torch.no_grad()
def l2_step_reference(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    radius: torch.Tensor,
    step_size: torch.Tensor,
    lo: float,
    hi: float,
) -> None:
    if not x_adv.numel():
        return
    grad = grad.to(torch.promote_types(compute_dtype(grad.dtype), x.dtype))
    scale, root = scale_and_root(grad)
    direction = (rows(grad) / nonzero(scale) / nonzero(root)).to(x.dtype).view(x.shape)
    moved = x_adv + column(step_size, x) * direction
    delta = moved - x
    scale, root = scale_and_root(delta)
    factor = radius[:, None] / nonzero(scale) / nonzero(root)
    inside = scale * root <= radius[:, None]
    projected = torch.where(column(inside, x), moved, x + delta * column(factor, x))
    x_adv.copy_(projected.clamp(lo, hi))


@torch.no_grad()
def l2_start_reference(
    x: torch.Tensor, radius: torch.Tensor, seed: torch.Tensor, index: torch.Tensor, lo: float, hi: float
) -> torch.Tensor:
    noise = by_element(normal_words(sample_words(x, seed, index, STREAM_L2), x.dtype), x)
    norm = rows(noise).square().sum(1).sqrt()
    u = uniform_words(philox_words(index, seed, STREAM_L2_RADIUS)[:, 0, 0], x.dtype) + 2.0**-24
    length = radius * torch.exp(torch.log(u) / max(1, x.shape[1:].numel()))
    return in_layout_of(x, torch.clamp(x + column(length / nonzero(norm), x) * noise, lo, hi))


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def norm_of(v):
    """The norm of a tile as two factors; values outside the sample must be 0."""
    scale = tl.max(tl.abs(v), 0)
    unit = v / tl.where(scale == 0.0, 1.0, scale)
    return scale, tl.sqrt(tl.sum(unit * unit, 0))


@triton.jit
def norm_of_parts(part_ptr, parts, sample, blocks):
    """The norm of a sample from those of its tiles, (2, B, blocks) with `parts` = B * blocks."""
    scale = tl.full((), 0.0, tl.float32)
    square = tl.full((), 0.0, tl.float32)
    for first in range(0, blocks, 128):
        block = first + tl.arange(0, 128)
        at = part_ptr + sample * blocks + block
        part_scale = tl.load(at, mask=block < blocks, other=0.0)
        part_root = tl.load(at + parts, mask=block < blocks, other=0.0)
        top = tl.maximum(scale, tl.max(part_scale, 0))
        divisor = tl.where(top == 0.0, 1.0, top)
        part = part_root * (part_scale / divisor)
        square = square * (scale / divisor) * (scale / divisor) + tl.sum(part * part, 0)
        scale = top
    return scale, tl.sqrt(square)


@triton.jit
def moved_by(adv, grad, step, scale, root):
    """adv + step * grad / |grad|."""
    unit = grad / tl.where(scale == 0.0, 1.0, scale)
    return adv + step * (unit / tl.where(root == 0.0, 1.0, root))


@triton.jit
def projected(moved, x, radius, scale, root):
    """The move where it stays in the ball, else scaled down to its surface; NaN where the norm is."""
    factor = radius / tl.where(scale == 0.0, 1.0, scale) / tl.where(root == 0.0, 1.0, root)
    return tl.where(scale * root <= radius, moved, x + (moved - x) * factor)


@triton.jit
def _l2_step_kernel(
    adv_ptr,  # (B, ...) in place
    grad_ptr,  # (B, ...)
    x_ptr,  # (B, ...)
    radius_ptr,  # (B,)
    step_ptr,  # (B,)
    part_ptr,  # (4, B, blocks): scale and root of the tiles' gradients, then of their differences from x
    n,
    blocks,
    batch,
    size_1,
    size_2,
    adv_b,
    adv_0,
    adv_1,
    adv_2,
    grad_b,
    grad_0,
    grad_1,
    grad_2,
    x_b,
    x_0,
    x_1,
    x_2,
    radius_stride,
    step_stride,
    lo,
    hi,
    STAGE: tl.constexpr,  # "all": a sample is one tile; else "grad", "delta", "write" in turn
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, element, inside = tile_of(n, blocks, BLOCK)
    grad_at = grad_ptr + sample * grad_b + offset_of(element, size_1, size_2, grad_0, grad_1, grad_2, FLAT, WIDE)
    grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    part_at = part_ptr + tl.program_id(0).to(tl.int64)
    parts = batch.to(tl.int64) * blocks
    if STAGE == "grad":
        scale, root = norm_of(grad)
        tl.store(part_at, scale)
        tl.store(part_at + parts, root)
    else:
        adv_at = adv_ptr + sample * adv_b + offset_of(element, size_1, size_2, adv_0, adv_1, adv_2, FLAT, WIDE)
        x_at = x_ptr + sample * x_b + offset_of(element, size_1, size_2, x_0, x_1, x_2, FLAT, WIDE)
        adv = tl.load(adv_at, mask=inside, other=0.0)
        x = tl.load(x_at, mask=inside, other=0.0)
        step = tl.load(step_ptr + sample * step_stride)
        if STAGE == "all":
            scale, root = norm_of(grad)
        else:
            scale, root = norm_of_parts(part_ptr, parts, sample, blocks)
        moved = moved_by(adv, grad, step, scale, root)
        if STAGE == "write":
            scale, root = norm_of_parts(part_ptr + 2 * parts, parts, sample, blocks)
        else:
            scale, root = norm_of(tl.where(inside, moved - x, 0.0))
        if STAGE == "delta":
            tl.store(part_at + 2 * parts, scale)
            tl.store(part_at + 3 * parts, root)
        else:
            radius = tl.load(radius_ptr + sample * radius_stride)
            value = clamp_between(projected(moved, x, radius, scale, root), lo, hi)
            tl.store(adv_at, value, mask=inside)


@triton.jit
def _l2_start_kernel(
    out_ptr,  # (B, ...)
    x_ptr,  # (B, ...)
    radius_ptr,  # (B,)
    seed_ptr,  # (1,) int64
    index_ptr,  # (B,) int64
    square_ptr,  # (B, blocks): sum of the squared noise; written by STAGE "norm", its total read by "write"
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
    lo,
    hi,
    STREAM: tl.constexpr,
    STREAM_RADIUS: tl.constexpr,
    STAGE: tl.constexpr,  # "all": a sample is one tile; else "norm", then "write"
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
        u = ((word >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8  # 2**-24
        length = tl.load(radius_ptr + sample * radius_stride) * tl.exp(tl.log(u) / n)
        scale = length / tl.where(square == 0.0, 1.0, tl.sqrt(square))
        x_at = x_ptr + sample * x_b + offset_of(element, size_1, size_2, x_0, x_1, x_2, FLAT, WIDE)
        out_at = out_ptr + sample * out_b + offset_of(element, size_1, size_2, out_0, out_1, out_2, FLAT, WIDE)
        value = tl.load(x_at, mask=inside) + scale * noise
        tl.store(out_at, clamp_between(value, lo, hi), mask=inside)


# launchers ---------------------------------------------------------------------------------------------------
def tile_shape(x: torch.Tensor) -> tuple[int, int, bool]:
    """Elements and warps of a tile, and whether it holds a whole sample."""
    n = x.shape[1:].numel()
    block = max(16, min(MAX_TILE, triton.next_power_of_2(n)))
    return block, max(1, block // 256), n <= block


def l2_step_triton(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    radius: torch.Tensor,
    step_size: torch.Tensor,
    lo: float,
    hi: float,
) -> None:
    if not x_adv.numel():
        return
    target = x_adv
    if not fits(x_adv, grad, x):
        target, grad, x = x_adv.contiguous(), grad.contiguous(), x.contiguous()
    block, warps, whole = tile_shape(x)
    grid, arguments = loop_arguments(block, adv=target, grad=grad, x=x)

    part = radius if whole else radius.new_empty(4, x.shape[0], arguments["blocks"])
    for stage in ("all",) if whole else ("grad", "delta", "write"):
        _l2_step_kernel[grid](
            radius_ptr=radius,
            step_ptr=step_size,
            part_ptr=part,
            batch=x.shape[0],
            radius_stride=radius.stride(0),
            step_stride=step_size.stride(0),
            lo=lo,
            hi=hi,
            STAGE=stage,
            num_warps=warps,
            **arguments,
        )
    if target.data_ptr() != x_adv.data_ptr():
        x_adv.copy_(target)


def l2_start_triton(
    x: torch.Tensor, radius: torch.Tensor, seed: torch.Tensor, index: torch.Tensor, lo: float, hi: float
) -> torch.Tensor:
    out, target, source = start_operands(x)
    if not out.numel():
        return out
    block, warps, whole = tile_shape(x)
    grid, arguments = loop_arguments(block, logical=True, out=target, x=source)

    def launch(stage: str, square: torch.Tensor) -> None:
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


# registration ------------------------------------------------------------------------------------------------
L2_STEP = Op(
    schema=(
        "l2_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor radius, Tensor step_size, "
        "float lo, float hi) -> ()"
    ),
    reference=l2_step_reference,
    fake=step_fake,
    triton=l2_step_triton,
    mutates=(0,),
    # in l2 units: from samples that are projected to samples that stay inside
    samples=lambda device: ((*s[:3], 20 * s[3], 10 * s[4], *s[5:]) for s in step_samples(device)),
    bytes_moved=step_bytes,
    compiles=tuple(
        Compile(
            kernel=_l2_step_kernel,
            signature={
                **loop_types(adv="fp32", grad=grad, x="fp32"),
                **dict(radius_ptr="*fp32", step_ptr="*fp32", part_ptr="*fp32", batch="i32"),
                **dict(radius_stride="i32", step_stride="i32", lo="fp32", hi="fp32"),
            },
            constants={"STAGE": stage, "FLAT": flat, "WIDE": False, "BLOCK": block},
            num_warps=warps,
        )
        for stage, grad, flat, block, warps in (
            ("all", "fp32", True, 4096, 16),
            ("all", "bf16", True, 1024, 4),
            ("all", "fp16", False, 4096, 16),
            ("grad", "fp32", True, 4096, 16),
            ("delta", "fp32", True, 4096, 16),
            ("write", "fp32", False, 4096, 16),
        )
    ),
)
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


# public functions --------------------------------------------------------------------------------------------
def l2_step_(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    radius: float | torch.Tensor,
    step_size: float | torch.Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
) -> torch.Tensor:
    """One ascending l2 step in place: x_adv + step_size * grad / |grad|, projected and clamped.

    The projection scales x_adv - x down to length radius where it is longer; then comes clamp(., lo, hi).
    Arguments, layouts, result and errors: as `linf_step_`; radius and step_size are l2 lengths of a whole sample.
    A sample whose gradient is 0 does not move. The norms neither over- nor underflow, whatever the size of the
    gradient. The last clamp moves every pixel towards x where x lies in [lo, hi], so it keeps inside the ball;
    |x_adv - x| <= radius up to a few float roundings. A sample with a NaN or an infinity in x_adv, grad or x, or
    with a NaN radius or step_size, becomes NaN as a whole. Source: Madry et al., 2018 (PGD in the l2 ball).
    """
    check_step(x_adv, grad, x, lo, hi)
    L2_STEP(x_adv, grad, x, per_sample(radius, x, "radius"), per_sample(step_size, x, "step_size"), lo, hi)
    return mark_written(x_adv)


def l2_start(
    x: torch.Tensor,
    radius: float | torch.Tensor,
    seed: torch.Tensor,
    index: torch.Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
) -> torch.Tensor:
    """x plus noise that is uniform in each sample's l2 ball, clamped to [lo, hi].

    The direction is that of n standard normals, the length radius * u**(1 / n) with u uniform in (0, 1], n the
    number of elements of a sample. The clamp moves every pixel towards x where x lies in [lo, hi], so the result
    stays in the ball (up to a few float roundings), but is no longer uniform there.
    Arguments, result, determinism and errors: as `uniform_start`. NaN in x stays NaN; a NaN radius makes its
    sample NaN. Source: Muller, "A note on a method for generating points uniformly on n-dimensional spheres",
    1959.
    """
    check_start(x, seed, index, lo, hi)
    return L2_START(x, per_sample(radius, x, "radius"), seed, index, lo, hi)
