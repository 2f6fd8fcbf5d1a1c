"""KL divergence between two softmaxes, a value a sample, with a fused backward pass for both arguments.

Computed in float32 (float64 for float64 logits) whatever the type of the logits; differentiable once.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import Op, compute_dtype, number, tl, triton
from mwpb_kernels.rows import (
    check_pair,
    first_largest_rows,
    like_fake,
    load_logits,
    pair_launch,
    pair_samples,
    pick_rows,
    row_compile,
    row_fake,
    softmax_rows,
    store_rows,
    tile,
    with_grad,
)


# reference ---------------------------------------------------------------------------------------------------
def _softmaxes(logits_p: Tensor, logits_q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-softmaxes, p = exp(log p) and where p is 0: it counts as 0 below the smallest normal number."""
    dtype = compute_dtype(logits_p.dtype)
    log_p = torch.log_softmax(logits_p.to(dtype), dim=1)
    p = log_p.exp()
    return log_p, torch.log_softmax(logits_q.to(dtype), dim=1), p, p < torch.finfo(dtype).tiny


def kl_div_reference(logits_p: Tensor, logits_q: Tensor, floor: float) -> Tensor:
    log_p, log_q, p, zero = _softmaxes(logits_p, logits_q)
    if floor > 0:
        log_q = torch.log(log_q.exp() + floor)
    return (p * torch.where(zero, 0, log_p - log_q)).sum(1)


@torch.no_grad()
def kl_div_backward_reference(
    grad: Tensor, logits_p: Tensor, logits_q: Tensor, floor: float
) -> tuple[Tensor, Tensor]:
    _, log_q, p, zero = _softmaxes(logits_p, logits_q)
    grad, q = grad[:, None], log_q.exp()
    # p (log ratio - KL) with both counted from the likeliest class: where that one dominates they nearly cancel
    zp = logits_p.to(p.dtype)
    top, likeliest = zp.max(1, keepdim=True)
    other = torch.log(q + floor) if floor > 0 else logits_q.to(p.dtype)
    relative = torch.where(zero, 0, (zp - top) - (other - other.gather(1, likeliest)))
    kl = (p * relative).sum(1, keepdim=True)
    by_p = grad * (torch.where(zero, 0, p * (relative - kl)) + (kl - kl))
    weight = p * (q / (q + floor)) if floor > 0 else p
    by_q = grad * (q * (weight.sum(1, keepdim=True) if floor > 0 else 1) - weight)
    return by_p.to(logits_p.dtype), by_q.to(logits_q.dtype)


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _is_zero(p):
    """p counts as 0 below the smallest normal number, whether or not the processor keeps such numbers."""
    return p < 1.1754943508222875e-38


@triton.jit
def _kl_div_kernel(
    out_ptr,  # (B,)
    p_ptr,  # (B, C) logits
    q_ptr,  # (B, C) logits
    batch, classes, p_stride_b, p_stride_c, q_stride_b, q_stride_c, floor,
    FLOOR: tl.constexpr,  # floor > 0
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    zp = load_logits(p_ptr, row, column, inside, p_stride_b, p_stride_c)
    e, total, top = softmax_rows(zp, inside)
    p = e / total[:, None]
    log_ratio = zp - top[:, None] - tl.log(total)[:, None]
    zq = load_logits(q_ptr, row, column, inside, q_stride_b, q_stride_c)
    e, total, top = softmax_rows(zq, inside)
    if FLOOR:
        log_ratio -= tl.log(e / total[:, None] + floor)
    else:
        log_ratio -= zq - top[:, None] - tl.log(total)[:, None]
    kl = tl.sum(p * tl.where(_is_zero(p), 0.0, log_ratio), 1)
    tl.store(out_ptr + row, kl, mask=row < batch)


@triton.jit
def _kl_div_backward_kernel(
    by_p_ptr,  # (B, C) contiguous
    by_q_ptr,  # (B, C) contiguous
    grad_ptr,  # (B,)
    p_ptr,  # (B, C) logits
    q_ptr,  # (B, C) logits
    batch, classes, p_stride_b, p_stride_c, q_stride_b, q_stride_c, grad_stride, floor,
    FLOOR: tl.constexpr,  # floor > 0
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    grad = tl.load(grad_ptr + row * grad_stride, mask=row < batch, other=0.0)[:, None]
    zp = load_logits(p_ptr, row, column, inside, p_stride_b, p_stride_c)
    likeliest, _ = first_largest_rows(zp, column, inside)
    e, total, top = softmax_rows(zp, inside)
    p = e / total[:, None]
    zq = load_logits(q_ptr, row, column, inside, q_stride_b, q_stride_c)
    e, total, _ = softmax_rows(zq, inside)
    q = e / total[:, None]
    other = tl.log(q + floor) if FLOOR else zq
    relative = zp - top[:, None] - (other - pick_rows(other, likeliest)[:, None])
    relative = tl.where(_is_zero(p), 0.0, relative)
    kl = tl.sum(p * relative, 1)[:, None]
    by_p = grad * (tl.where(_is_zero(p), 0.0, p * (relative - kl)) + (kl - kl))
    store_rows(by_p_ptr, by_p, row, column, inside, classes)
    if FLOOR:
        weight = tl.where(inside, p * (q / (q + floor)), 0.0)
        by_q = grad * (q * tl.sum(weight, 1)[:, None] - weight)
    else:
        by_q = grad * (q - p)
    store_rows(by_q_ptr, by_q, row, column, inside, classes)


# launchers ---------------------------------------------------------------------------------------------------
def kl_div_triton(logits_p: Tensor, logits_q: Tensor, floor: float) -> Tensor:
    out = row_fake(logits_p)
    if out.numel():
        grid, arguments = pair_launch(logits_p, logits_q)
        _kl_div_kernel[grid](out_ptr=out, floor=floor, FLOOR=floor > 0, **arguments)
    return out


def kl_div_backward_triton(
    grad: Tensor, logits_p: Tensor, logits_q: Tensor, floor: float
) -> tuple[Tensor, Tensor]:
    by_p, by_q = like_fake(logits_p), like_fake(logits_q)
    if by_p.numel():
        grid, arguments = pair_launch(logits_p, logits_q)
        _kl_div_backward_kernel[grid](
            by_p_ptr=by_p,
            by_q_ptr=by_q,
            grad_ptr=grad,
            grad_stride=grad.stride(0),
            floor=floor,
            FLOOR=floor > 0,
            **arguments,
        )
    return by_p, by_q


# registration ------------------------------------------------------------------------------------------------
def _pair_samples(device: torch.device) -> Any:
    return ((p, q, floor) for floor in (0.0, 1e-12) for p, q in pair_samples(device))


def _save_pair(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.floor = inputs[2]


def _kl_div_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *KL_DIV_BACKWARD(grad, *ctx.saved_tensors, ctx.floor), None


KL_DIV_BACKWARD = Op(
    schema="kl_div_backward(Tensor grad, Tensor logits_p, Tensor logits_q, float floor) -> (Tensor, Tensor)",
    reference=kl_div_backward_reference,
    fake=lambda grad, logits_p, logits_q, floor: (like_fake(logits_p), like_fake(logits_q)),
    triton=kl_div_backward_triton,
    samples=lambda device: with_grad(_pair_samples(device)),
    bytes_moved=lambda grad, p, q, floor: 4 * p.numel() * p.element_size() + len(p) * grad.element_size(),
    compiles=tuple(
        compile_
        for floored in (False, True)
        for compile_ in row_compile(
            _kl_div_backward_kernel,
            {"FLOOR": floored},
            by_p_ptr="*{t}",
            by_q_ptr="*{t}",
            grad_ptr="*fp32",
            floor="fp32",
        )
    ),
)
KL_DIV = Op(
    schema="kl_div(Tensor logits_p, Tensor logits_q, float floor) -> Tensor",
    reference=kl_div_reference,
    fake=row_fake,
    triton=kl_div_triton,
    setup_context=_save_pair,
    backward=_kl_div_backward,
    differentiable=(0, 1),
    samples=_pair_samples,
    bytes_moved=lambda p, q, floor: 2 * p.numel() * p.element_size() + len(p) * 4,
    compiles=tuple(
        compile_
        for floored in (False, True)
        for compile_ in row_compile(_kl_div_kernel, {"FLOOR": floored}, out_ptr="*fp32", floor="fp32")
    ),
)


# public functions --------------------------------------------------------------------------------------------
def kl_div(logits_p: Tensor, logits_q: Tensor, floor: float = 0.0) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log(q_c + floor)) of every row, p and q the softmaxes of the logits.

    logits_p, logits_q: (B, C), C >= 2, both float32, bfloat16, float16 or float64, any strides. floor: 0 (TRADES)
    or at least 1e-30 (MART: 1e-12). Returns (B,) float32 (float64 for float64 logits), not negative but for
    rounding and C * floor. A class with p_c = 0 adds 0, one with q_c = 0 < p_c adds infinity when floor is 0.
    Differentiable once in both; where the value is infinite the gradient in logits_p is NaN. A row with a NaN or
    +inf in either, or of -inf only, gives NaN. Raises ValueError or TypeError for other floors, shapes, types or
    mixed devices. Source: TRADES' and MART's regulariser, the sum over the classes.
    """
    check_pair(logits_p=logits_p, logits_q=logits_q)
    floor = number(floor, "floor")
    if not (floor == 0 or 1e-30 <= floor < inf):
        raise ValueError(f"floor must be 0 or at least 1e-30, and finite, not {floor}")
    return KL_DIV(logits_p, logits_q, floor)
