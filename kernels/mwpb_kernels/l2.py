"""The l2 attack step: the gradient's norm, the step and the projection to each sample's own ball in one op.

x_adv <- clamp(project(x_adv + step_size * grad / |grad|), lo, hi), where project scales the difference from x down
to each sample's own radius. Norms are taken of values divided by the largest one, so that neither tiny nor
huge gradients under- or overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mwpb_kernels.linf import step_bytes, step_samples
from mwpb_kernels.op import Compile, Op, compute_dtype, tl, triton, writes_in_place
from mwpb_kernels.strided import (
    check_step,
    clamp_between,
    column,
    fits,
    loop_arguments,
    loop_types,
    nonzero,
    offset_of,
    per_sample,
    pixel_range,
    rows,
    tile_of,
    tile_shape,
    widened,
)


# reference ---------------------------------------------------------------------------------------------------
def scale_and_root(t: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of every sample as two factors (B, 1): the largest magnitude, and the norm of what that leaves."""
    scale = rows(t).abs().amax(1, keepdim=True)
    return scale, (rows(t) / nonzero(scale)).square().sum(1, keepdim=True).sqrt()


@torch.no_grad()
def l2_step_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, radius: Tensor, step_size: Tensor, lo: float, hi: float
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
    n, blocks, size_1, size_2,
    adv_b, adv_0, adv_1, adv_2,
    grad_b, grad_0, grad_1, grad_2,
    x_b, x_0, x_1, x_2,
    radius_stride, step_stride, lo, hi,
    STAGE: tl.constexpr,  # "all": a sample is one tile; else "grad", "delta", "write" in turn
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, element, inside = tile_of(n, blocks, BLOCK)
    grad_at = grad_ptr + sample * grad_b + offset_of(element, size_1, size_2, grad_0, grad_1, grad_2, FLAT, WIDE)
    grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    part_at = part_ptr + tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(0).to(tl.int64)
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


# launchers ---------------------------------------------------------------------------------------------------
def l2_step_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, radius: Tensor, step_size: Tensor, lo: float, hi: float
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


# registration ------------------------------------------------------------------------------------------------
L2_STEP = Op(
    schema=(
        "l2_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor radius, Tensor step_size, "
        "float lo, float hi) -> ()"
    ),
    reference=l2_step_reference,
    fake=writes_in_place,
    triton=l2_step_triton,
    mutates=(0,),
    # An l2 length sums over all pixels; with these factors some samples are projected and some stay inside.
    samples=lambda device: ((*s[:3], 20 * s[3], 10 * s[4], *s[5:]) for s in step_samples(device)),
    bytes_moved=step_bytes,
    compiles=tuple(
        Compile(
            kernel=_l2_step_kernel,
            signature={
                **loop_types(adv="fp32", grad=grad, x="fp32"),
                **dict(radius_ptr="*fp32", step_ptr="*fp32", part_ptr="*fp32"),
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


# public function ---------------------------------------------------------------------------------------------
def l2_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    radius: float | Tensor,
    step_size: float | Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """One ascending l2 step in place: x_adv + step_size * grad / |grad|, projected and clamped.

    The projection scales x_adv - x down to length radius where it is longer; then comes clamp(., lo, hi).
    Arguments, layouts, result and errors: as `linf_step_`; radius and step_size are l2 lengths of a whole sample.
    A sample whose gradient is 0 does not move. The norms neither over- nor underflow, whatever the size of the
    gradient. The last clamp moves every pixel towards x where x lies in [lo, hi], so it keeps inside the ball;
    |x_adv - x| <= radius up to a few float roundings. A sample with a NaN or an infinity in x_adv, grad or x, or
    with a NaN radius or step_size, becomes NaN as a whole. Source: Madry et al., 2018 (PGD in the l2 ball).
    """
    check_step(x_adv, grad, x)
    x = widened(x)
    lo, hi = pixel_range(lo, hi)
    L2_STEP(x_adv, grad, x, per_sample(radius, x, "radius"), per_sample(step_size, x, "step_size"), lo, hi)
    return x_adv
