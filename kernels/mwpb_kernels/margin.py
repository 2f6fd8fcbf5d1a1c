"""Probability margin and the per-sample radii that MWPB derives from the logits of the natural images.

margin m = p_y - max_{j != y} p_j and radius = exp(alpha * m) * eps: Eq. 2 and 3 of the MWPB paper. One pass
over the logits; computed in float32 (float64 for float64 logits) whatever their type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import Op, check_logits, compute_dtype, number, tl, triton
from mwpb_kernels.rows import (
    first_largest_rows,
    like_fake,
    load_labels,
    load_logits,
    logit_samples,
    one_hot,
    pick,
    pick_rows,
    poison,
    row_bytes,
    row_compile,
    row_fake,
    run_rows,
    runner_up,
    save_inputs,
    softmax_rows,
    split,
    split_rows,
    store_rows,
    tile,
    with_grad,
)


# reference ---------------------------------------------------------------------------------------------------
def margin_reference(logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    own = one_hot(labels, z.shape[1])
    p = torch.softmax(z, dim=1)
    return poison(pick(p, own) - pick(p, runner_up(z, own)), labels, z.shape[1])


@torch.no_grad()
def margin_radius_reference(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    return torch.exp(alpha * margin_reference(logits, labels)) * eps


@torch.no_grad()
def deviation_radius_reference(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    p = torch.softmax(z, dim=1)
    apart = p - pick(p, one_hot(labels, z.shape[1]))[:, None]
    score = (apart.square().sum(1) / (z.shape[1] - 1)).sqrt()
    return poison(torch.exp(alpha * score) * eps, labels, z.shape[1])


@torch.no_grad()
def standardised_radius_reference(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    p = torch.softmax(z, dim=1)
    centred = p - 1.0 / z.shape[1]
    deviation = centred.square().mean(1).sqrt()
    distance = pick(centred, one_hot(labels, z.shape[1]))
    score = torch.where(deviation == 0, 0, distance / deviation)
    return poison(torch.exp(alpha * score) * eps, labels, z.shape[1])


@torch.no_grad()
def margin_backward_reference(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    own = one_hot(labels, z.shape[1])
    other = runner_up(z, own)
    p = torch.softmax(z, dim=1)
    p_own, p_other, rest = split(p, own, other)
    result = torch.where(other, -p_other * (rest + 2 * p_own), -p * (p_own - p_other))
    result = grad[:, None] * torch.where(own, p_own * (rest + 2 * p_other), result)
    return poison(result, labels, z.shape[1]).to(logits.dtype)


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _radius_kernel(
    out_ptr,  # (B,)
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch, classes, stride_b, stride_c, label_stride, eps, alpha,
    SCORE: tl.constexpr,  # "margin": the margin itself; else the radius of the op of that name
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    z = load_logits(logits_ptr, row, column, inside, stride_b, stride_c)
    own, valid = load_labels(labels_ptr, row, column, label_stride, batch, classes)
    e, total, _ = softmax_rows(z, inside)
    if SCORE == "deviation_radius":
        apart = tl.where(inside, e - pick_rows(e, own)[:, None], 0.0)
        score = tl.sqrt(tl.sum(apart * apart, 1) / (classes - 1)) / total
    elif SCORE == "standardised_radius":
        # Both quotients are rounded correctly, so that they cancel exactly at the uniform distribution.
        count = tl.zeros((ROWS, BLOCK), tl.float32) + classes
        mean = tl.div_rn(tl.full((ROWS, BLOCK), 1.0, tl.float32), count)
        p = tl.div_rn(e, tl.broadcast_to(total[:, None], (ROWS, BLOCK)))
        centred = tl.where(inside, p - mean, 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, 1) / classes)
        score = tl.where(deviation == 0.0, 0.0, pick_rows(centred, own) / deviation)
    else:
        second, _ = first_largest_rows(z, column, inside & (own == 0))
        score = (pick_rows(e, own) - pick_rows(e, second)) / total
    if SCORE != "margin":
        score = tl.exp(alpha * score) * eps
    tl.store(out_ptr + row, tl.where(valid, score, float("nan")), mask=row < batch)


@triton.jit
def _margin_backward_kernel(
    out_ptr,  # (B, C) contiguous
    grad_ptr,  # (B,)
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch, classes, stride_b, stride_c, label_stride, grad_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    z = load_logits(logits_ptr, row, column, inside, stride_b, stride_c)
    own, valid = load_labels(labels_ptr, row, column, label_stride, batch, classes)
    grad = tl.load(grad_ptr + row * grad_stride, mask=row < batch, other=0.0)
    e, total, _ = softmax_rows(z, inside)
    p = e / total[:, None]
    other, _ = first_largest_rows(z, column, inside & (own == 0))
    p_own, p_other, rest = split_rows(p, own, other)
    result = tl.where(other, -p_other * (rest + 2 * p_own), -p * (p_own - p_other))
    result = grad[:, None] * tl.where(own, p_own * (rest + 2 * p_other), result)
    store_rows(out_ptr, tl.where(valid[:, None], result, float("nan")), row, column, inside, classes)


# launchers ---------------------------------------------------------------------------------------------------
def _run_radius(score: str, logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    return run_rows(_radius_kernel, row_fake(logits), logits, labels, eps=eps, alpha=alpha, SCORE=score)


def margin_triton(logits: Tensor, labels: Tensor) -> Tensor:
    return _run_radius("margin", logits, labels, 1.0, 1.0)


def margin_radius_triton(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    return _run_radius("margin_radius", logits, labels, eps, alpha)


def deviation_radius_triton(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    return _run_radius("deviation_radius", logits, labels, eps, alpha)


def standardised_radius_triton(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    return _run_radius("standardised_radius", logits, labels, eps, alpha)


def margin_backward_triton(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    own = dict(grad_ptr=grad, grad_stride=grad.stride(0))
    return run_rows(_margin_backward_kernel, like_fake(logits), logits, labels, **own)


# registration ------------------------------------------------------------------------------------------------
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return MARGIN_BACKWARD(grad, *ctx.saved_tensors), None


RADIUS_TYPES = {"out_ptr": "*fp32", "eps": "fp32", "alpha": "fp32"}
MARGIN_BACKWARD = Op(
    schema="margin_backward(Tensor grad, Tensor logits, Tensor labels) -> Tensor",
    reference=margin_backward_reference,
    fake=lambda grad, logits, labels: like_fake(logits),
    triton=margin_backward_triton,
    samples=lambda device: with_grad(logit_samples(device)),
    bytes_moved=lambda grad, logits, labels: 2 * logits.numel() * logits.element_size() + len(labels) * 12,
    compiles=row_compile(_margin_backward_kernel, out_ptr="*{t}", grad_ptr="*fp32"),
)
MARGIN = Op(
    schema="margin(Tensor logits, Tensor labels) -> Tensor",
    reference=margin_reference,
    fake=row_fake,
    triton=margin_triton,
    setup_context=save_inputs,
    backward=_backward,
    differentiable=(0,),
    samples=logit_samples,
    bytes_moved=row_bytes,
    compiles=row_compile(_radius_kernel, {"SCORE": "margin"}, **RADIUS_TYPES),
)
MARGIN_RADIUS = Op(
    schema="margin_radius(Tensor logits, Tensor labels, float eps, float alpha) -> Tensor",
    reference=margin_radius_reference,
    fake=row_fake,
    triton=margin_radius_triton,
    samples=lambda device: ((z, y, 8 / 255, 0.58) for z, y in logit_samples(device)),
    bytes_moved=row_bytes,
    compiles=row_compile(_radius_kernel, {"SCORE": "margin_radius"}, **RADIUS_TYPES),
)
DEVIATION_RADIUS = Op(
    schema="deviation_radius(Tensor logits, Tensor labels, float eps, float alpha) -> Tensor",
    reference=deviation_radius_reference,
    fake=row_fake,
    triton=deviation_radius_triton,
    samples=lambda device: ((z, y, 8 / 255, 0.3) for z, y in logit_samples(device)),
    bytes_moved=row_bytes,
    compiles=row_compile(_radius_kernel, {"SCORE": "deviation_radius"}, **RADIUS_TYPES),
)
STANDARDISED_RADIUS = Op(
    schema="standardised_radius(Tensor logits, Tensor labels, float eps, float alpha) -> Tensor",
    reference=standardised_radius_reference,
    fake=row_fake,
    triton=standardised_radius_triton,
    samples=lambda device: ((z, y, 8 / 255, 0.3) for z, y in logit_samples(device)),
    bytes_moved=row_bytes,
    compiles=row_compile(_radius_kernel, {"SCORE": "standardised_radius"}, **RADIUS_TYPES),
)


# public functions --------------------------------------------------------------------------------------------
def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability margin p_y - max_{j != y} p_j of every row, p = softmax(logits).

    logits: (B, C), C >= 2, float32, bfloat16, float16 or float64, any strides. labels: (B,) int64, any stride.
    Returns (B,) in [-1, 1], float32 (float64 for float64 logits). Differentiable once in the logits; at a tie
    for the runner-up the first class takes the gradient. A row with a NaN or +inf logit, or with a label
    outside [0, C), gives NaN. Raises ValueError or TypeError for other shapes, types or mixed devices.
    Source: MWPB, Eq. 2.
    """
    check_logits(logits, labels)
    return MARGIN(logits, labels)


def margin_radius(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    """MWPB's radius exp(alpha * margin) * eps of every sample, in one pass over the logits.

    logits, labels: as `margin` takes them. eps: the base radius in the images' units (8/255 for images in
    [0, 1]). alpha: how far the margin stretches it; the radius lies in [exp(-alpha), exp(alpha)] * eps.
    Returns (B,) float32 (float64 for float64 logits), a constant: no gradient flows through it.
    Errors and NaN: as `margin`. Source: MWPB, Eq. 3.
    """
    check_logits(logits, labels)
    return MARGIN_RADIUS(logits, labels, number(eps, "eps"), number(alpha, "alpha"))


def deviation_radius(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    """The deviation-weighted radius exp(alpha * s) * eps of every sample, in one pass over the logits.

    s = sqrt(sum_k (p_k - p_y)^2 / (C - 1)), p = softmax(logits): how far the classes lie from the true one's
    probability, right or wrong. s is in [0, 1]: 0 at the uniform distribution, 1 at a certain right answer,
    1 / sqrt(C - 1) at a certain wrong one. So the radius is never below eps.
    Arguments, result, errors and NaN: as `margin_radius`.
    Source: the formula that the authors of MWPB released for SDWPB (arXiv 2403.04070), which their paper may state
    otherwise.
    """
    check_logits(logits, labels)
    return DEVIATION_RADIUS(logits, labels, number(eps, "eps"), number(alpha, "alpha"))


def standardised_radius(logits: Tensor, labels: Tensor, eps: float, alpha: float) -> Tensor:
    """Radius exp(alpha * s) * eps with s = (p_y - mean(p)) / std(p), the population's standard deviation.

    p = softmax(logits); s = 0 at the uniform distribution. A reading of the name of SDWPB (arXiv 2403.04070) from
    before its released formula was known, see `deviation_radius`; nobody is known to have used it.
    Arguments, result, errors and NaN: as `margin_radius`; here the radius may reach exp(alpha * sqrt(C-1)) * eps.
    """
    check_logits(logits, labels)
    return STANDARDISED_RADIUS(logits, labels, number(eps, "eps"), number(alpha, "alpha"))
