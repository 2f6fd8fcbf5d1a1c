"""Gradients of the attack losses with respect to the logits, in closed form: one pass, no autograd graph.

An attack feeds them to the model's backward pass. Each is the gradient of the loss summed over the batch, in the
logits' type, computed in float32 (float64 for float64 logits).
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import Op, check_logits, compute_dtype, number, tl, triton
from mwpb_kernels.rows import (
    check_pair,
    first_largest_rows,
    grad_bytes,
    like_fake,
    load_labels,
    load_logits,
    logit_samples,
    one_hot,
    pair_launch,
    pair_samples,
    pick,
    pick_rows,
    poison,
    poisoned_rows,
    row_compile,
    run_rows,
    runner_up,
    softmax_rows,
    store_rows,
    tile,
)


# reference ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def ce_grad_reference(logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    result = torch.softmax(z, dim=1) - one_hot(labels, z.shape[1]).to(z.dtype)
    return poison(result, labels, z.shape[1]).to(logits.dtype)


@torch.no_grad()
def kl_grad_reference(logits: Tensor, target_logits: Tensor) -> Tensor:
    dtype = compute_dtype(logits.dtype)
    result = torch.softmax(logits.to(dtype), dim=1) - torch.softmax(target_logits.to(dtype), dim=1)
    return result.to(logits.dtype)


@torch.no_grad()
def cw_grad_reference(logits: Tensor, labels: Tensor, confidence: float) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    own = one_hot(labels, z.shape[1])
    other = runner_up(z, own)
    gap = pick(z, own) - pick(z, other)
    defined = (z < torch.inf).all(1) & ~gap.isnan()
    active = gap + confidence > 0
    result = torch.where(active[:, None], other.to(z.dtype) - own.to(z.dtype), 0)
    return poison(result.masked_fill(~defined[:, None], torch.nan), labels, z.shape[1]).to(logits.dtype)


@torch.no_grad()
def dlr_grad_reference(logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    classes = z.shape[1]
    own = one_hot(labels, classes)
    other = runner_up(z, own)
    values, order = z.sort(dim=1, descending=True, stable=True)
    first, third = one_hot(order[:, 0], classes), one_hot(order[:, 2], classes)
    slope = 1 / (values[:, 0] - values[:, 2] + 1e-12)
    ratio = (pick(z, own) - pick(z, other)) * slope
    defined = (z < torch.inf).all(1) & ratio.isfinite()
    result = slope[:, None] * (other.to(z.dtype) - own.to(z.dtype))
    result = result + (ratio * slope)[:, None] * (first.to(z.dtype) - third.to(z.dtype))
    return poison(result.masked_fill(~defined[:, None], torch.nan), labels, classes).to(logits.dtype)


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _ce_grad_kernel(
    out_ptr,  # (B, C) contiguous
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch, classes, stride_b, stride_c, label_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    z = load_logits(logits_ptr, row, column, inside, stride_b, stride_c)
    own, valid = load_labels(labels_ptr, row, column, label_stride, batch, classes)
    e, total, _ = softmax_rows(z, inside)
    result = e / total[:, None] - tl.where(own, 1.0, 0.0)
    store_rows(out_ptr, tl.where(valid[:, None], result, float("nan")), row, column, inside, classes)


@triton.jit
def _kl_grad_kernel(
    out_ptr,  # (B, C) contiguous
    p_ptr,  # (B, C) logits
    q_ptr,  # (B, C) target logits
    batch, classes, p_stride_b, p_stride_c, q_stride_b, q_stride_c,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    e, total, _ = softmax_rows(load_logits(p_ptr, row, column, inside, p_stride_b, p_stride_c), inside)
    f, target_total, _ = softmax_rows(load_logits(q_ptr, row, column, inside, q_stride_b, q_stride_c), inside)
    store_rows(out_ptr, e / total[:, None] - f / target_total[:, None], row, column, inside, classes)


@triton.jit
def _margin_loss_grad_kernel(
    out_ptr,  # (B, C) contiguous
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch, classes, stride_b, stride_c, label_stride, confidence,
    LOSS: tl.constexpr,  # "cw" or "dlr"
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    z = load_logits(logits_ptr, row, column, inside, stride_b, stride_c)
    own, valid = load_labels(labels_ptr, row, column, label_stride, batch, classes)
    other, best = first_largest_rows(z, column, inside & (own == 0))
    gap = pick_rows(z, own) - best
    towards_other = tl.where(other, 1.0, 0.0) - tl.where(own, 1.0, 0.0)
    if LOSS == "cw":
        undefined = gap != gap
        result = tl.where((gap + confidence > 0.0)[:, None], towards_other, 0.0)
    else:
        # a removed class counts as -inf: where fewer than three logits are finite it may come up again
        first, largest = first_largest_rows(z, column, inside)
        rest = tl.where(first, float("-inf"), z)
        second, _ = first_largest_rows(rest, column, inside)
        rest = tl.where(second, float("-inf"), rest)
        third, smallest = first_largest_rows(rest, column, inside)
        slope = 1.0 / (largest - smallest + 1e-12)
        ratio = gap * slope
        undefined = (tl.abs(ratio) < float("inf")) == 0
        result = slope[:, None] * towards_other
        result += (ratio * slope)[:, None] * (tl.where(first, 1.0, 0.0) - tl.where(third, 1.0, 0.0))
    defined = valid & (undefined == 0) & (poisoned_rows(z, inside) == 0)
    store_rows(out_ptr, tl.where(defined[:, None], result, float("nan")), row, column, inside, classes)


# launchers ---------------------------------------------------------------------------------------------------
def ce_grad_triton(logits: Tensor, labels: Tensor) -> Tensor:
    return run_rows(_ce_grad_kernel, like_fake(logits), logits, labels)


def kl_grad_triton(logits: Tensor, target_logits: Tensor) -> Tensor:
    out = like_fake(logits)
    if out.numel():
        grid, arguments = pair_launch(logits, target_logits)
        _kl_grad_kernel[grid](out_ptr=out, **arguments)
    return out


def cw_grad_triton(logits: Tensor, labels: Tensor, confidence: float) -> Tensor:
    own = dict(confidence=confidence, LOSS="cw")
    return run_rows(_margin_loss_grad_kernel, like_fake(logits), logits, labels, **own)


def dlr_grad_triton(logits: Tensor, labels: Tensor) -> Tensor:
    return run_rows(_margin_loss_grad_kernel, like_fake(logits), logits, labels, confidence=0.0, LOSS="dlr")


# registration ------------------------------------------------------------------------------------------------
def _margin_loss_compile(loss: str) -> Any:
    return row_compile(_margin_loss_grad_kernel, {"LOSS": loss}, out_ptr="*{t}", confidence="fp32")


CE_GRAD = Op(
    schema="ce_grad(Tensor logits, Tensor labels) -> Tensor",
    reference=ce_grad_reference,
    fake=like_fake,
    triton=ce_grad_triton,
    samples=logit_samples,
    bytes_moved=grad_bytes,
    compiles=row_compile(_ce_grad_kernel, out_ptr="*{t}"),
)
KL_GRAD = Op(
    schema="kl_grad(Tensor logits, Tensor target_logits) -> Tensor",
    reference=kl_grad_reference,
    fake=like_fake,
    triton=kl_grad_triton,
    samples=pair_samples,
    bytes_moved=lambda logits, target_logits: 3 * logits.numel() * logits.element_size(),
    compiles=row_compile(_kl_grad_kernel, out_ptr="*{t}"),
)
CW_GRAD = Op(
    schema="cw_grad(Tensor logits, Tensor labels, float confidence) -> Tensor",
    reference=cw_grad_reference,
    fake=like_fake,
    triton=cw_grad_triton,
    samples=lambda device: ((z, y, k) for k in (50.0, 0.0) for z, y in logit_samples(device)),
    bytes_moved=grad_bytes,
    compiles=_margin_loss_compile("cw"),
)
DLR_GRAD = Op(
    schema="dlr_grad(Tensor logits, Tensor labels) -> Tensor",
    reference=dlr_grad_reference,
    fake=like_fake,
    triton=dlr_grad_triton,
    samples=lambda device: logit_samples(device, least=3),
    bytes_moved=grad_bytes,
    compiles=_margin_loss_compile("dlr"),
)


# public functions --------------------------------------------------------------------------------------------
def ce_grad(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy: softmax(logits) - onehot(labels).

    logits: (B, C), C >= 2, float32, bfloat16, float16 or float64, any strides. labels: (B,) int64, any stride.
    Returns (B, C) in the logits' type, contiguous, a constant: no gradient flows through it. A row with a NaN or
    +inf logit, of -inf only, or with a label outside [0, C) gives NaN. Raises ValueError or TypeError for other
    shapes, types or mixed devices.
    """
    check_logits(logits, labels)
    return CE_GRAD(logits, labels)


def kl_grad(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Gradient of sum_i KL(softmax(target_logits) || softmax(logits)) in `logits`, the target fixed.

    It is softmax(logits) - softmax(target_logits), exactly 0 where both rows are equal: TRADES therefore starts
    from a perturbed image. logits, target_logits: (B, C), C >= 2, of one type, any of `ce_grad`'s, any strides.
    Returns (B, C) as `ce_grad`. A row with a NaN or +inf in either, or of -inf only, gives NaN.
    Errors: as `ce_grad`; also for matrices of two shapes or types.
    """
    check_pair(logits=logits, target_logits=target_logits)
    return KL_GRAD(logits, target_logits)


def cw_grad(logits: Tensor, labels: Tensor, confidence: float = 50.0) -> Tensor:
    """Gradient of the summed CW margin loss -max(z_y - max_{j != y} z_j + confidence, 0).

    Where z_y - max_{j != y} z_j + confidence > 0 it is +1 at the runner-up (the first at a tie) and -1 at the true
    class; everything else is 0. logits, labels, result, NaN and errors: as `ce_grad`; also ValueError for a
    confidence that is not finite. Source: Carlini and Wagner's loss as Madry's CIFAR-10 challenge uses it.
    """
    check_logits(logits, labels)
    confidence = number(confidence, "confidence")
    if not -inf < confidence < inf:
        raise ValueError(f"confidence must be finite, not {confidence}")
    return CW_GRAD(logits, labels, confidence)


def dlr_grad(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the summed DLR loss -(z_y - max_{j != y} z_j) / (z_(1) - z_(3) + 1e-12).

    logits: (B, C), C >= 3 (else ValueError). z_(k) is the k-th largest logit; at ties the class with the lower
    number counts as the larger. A row whose loss is not finite gives NaN; otherwise logits, labels, result, NaN
    and errors are as in `ce_grad`. Source: Croce and Hein, AutoAttack.
    """
    check_logits(logits, labels)
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs logits of at least 3 classes, not {tuple(logits.shape)}")
    return DLR_GRAD(logits, labels)
