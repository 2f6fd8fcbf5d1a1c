"""MART's boosted cross-entropy per sample, with its exact constants and a fused backward pass.

Computed in float32 (float64 for float64 logits) whatever the type of the logits; differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import Op, check_logits, compute_dtype, tl, triton
from mwpb_kernels.rows import (
    first_largest_rows,
    grad_bytes,
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

# 1.0001 - p_r + 1e-12 is computed as (1 - p_r) + REST, 1 - p_r being the sum of the other probabilities: that
# stays exact near p_r = 1, where float32 would lose most digits of the difference.
REST = 1.00000001e-4


# reference ---------------------------------------------------------------------------------------------------
def boosted_ce_reference(logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    own = one_hot(labels, z.shape[1])
    log_p = torch.log_softmax(z, dim=1)
    rest = torch.where(runner_up(z, own), 0, log_p.exp()).sum(1)
    return poison(-pick(log_p, own) - torch.log(rest + REST), labels, z.shape[1])


@torch.no_grad()
def boosted_ce_backward_reference(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    own = one_hot(labels, z.shape[1])
    other = runner_up(z, own)
    p = torch.softmax(z, dim=1)
    p_own, p_other, rest = split(p, own, other)
    weight = p_other / (p_own + rest + REST)
    result = torch.where(other, p_other + weight * (p_own + rest), p * (1 - weight))
    result = torch.where(own, -(p_other + rest) - weight * p_own, result)
    return poison(grad[:, None] * result, labels, z.shape[1]).to(logits.dtype)


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _boosted_ce_kernel(
    out_ptr,  # (B,)
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch, classes, stride_b, stride_c, label_stride,
    CONSTANT: tl.constexpr,  # REST
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    z = load_logits(logits_ptr, row, column, inside, stride_b, stride_c)
    own, valid = load_labels(labels_ptr, row, column, label_stride, batch, classes)
    other, _ = first_largest_rows(z, column, inside & (own == 0))
    e, total, top = softmax_rows(z, inside)
    rest = tl.sum(tl.where(other, 0.0, e), 1) / total
    loss = tl.log(total) - (pick_rows(z, own) - top) - tl.log(rest + CONSTANT)
    tl.store(out_ptr + row, tl.where(valid, loss, float("nan")), mask=row < batch)


@triton.jit
def _boosted_ce_backward_kernel(
    out_ptr,  # (B, C) contiguous
    grad_ptr,  # (B,)
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch, classes, stride_b, stride_c, label_stride, grad_stride,
    CONSTANT: tl.constexpr,  # REST
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile(batch, classes, ROWS, BLOCK)
    z = load_logits(logits_ptr, row, column, inside, stride_b, stride_c)
    own, valid = load_labels(labels_ptr, row, column, label_stride, batch, classes)
    grad = tl.load(grad_ptr + row * grad_stride, mask=row < batch, other=0.0)
    other, _ = first_largest_rows(z, column, inside & (own == 0))
    e, total, _ = softmax_rows(z, inside)
    p = e / total[:, None]
    p_own, p_other, rest = split_rows(p, own, other)
    weight = p_other / (p_own + rest + CONSTANT)
    result = tl.where(other, p_other + weight * (p_own + rest), p * (1.0 - weight))
    result = tl.where(own, -(p_other + rest) - weight * p_own, result)
    result = tl.where(valid[:, None], grad[:, None] * result, float("nan"))
    store_rows(out_ptr, result, row, column, inside, classes)


# launchers ---------------------------------------------------------------------------------------------------
def boosted_ce_triton(logits: Tensor, labels: Tensor) -> Tensor:
    return run_rows(_boosted_ce_kernel, row_fake(logits), logits, labels, CONSTANT=REST)


def boosted_ce_backward_triton(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    own = dict(grad_ptr=grad, grad_stride=grad.stride(0), CONSTANT=REST)
    return run_rows(_boosted_ce_backward_kernel, like_fake(logits), logits, labels, **own)


# registration ------------------------------------------------------------------------------------------------
def _boosted_ce_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return BOOSTED_CE_BACKWARD(grad, *ctx.saved_tensors), None


BOOSTED_CE_BACKWARD = Op(
    schema="boosted_ce_backward(Tensor grad, Tensor logits, Tensor labels) -> Tensor",
    reference=boosted_ce_backward_reference,
    fake=lambda grad, logits, labels: like_fake(logits),
    triton=boosted_ce_backward_triton,
    samples=lambda device: with_grad(logit_samples(device)),
    bytes_moved=lambda grad, logits, labels: grad_bytes(logits, labels) + len(grad) * grad.element_size(),
    compiles=row_compile(_boosted_ce_backward_kernel, {"CONSTANT": REST}, out_ptr="*{t}", grad_ptr="*fp32"),
)
BOOSTED_CE = Op(
    schema="boosted_ce(Tensor logits, Tensor labels) -> Tensor",
    reference=boosted_ce_reference,
    fake=row_fake,
    triton=boosted_ce_triton,
    setup_context=save_inputs,
    backward=_boosted_ce_backward,
    differentiable=(0,),
    samples=logit_samples,
    bytes_moved=row_bytes,
    compiles=row_compile(_boosted_ce_kernel, {"CONSTANT": REST}, out_ptr="*fp32"),
)


# public functions --------------------------------------------------------------------------------------------
def boosted_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """MART's boosted cross-entropy -log p_y - log(1.0001 - max_{j != y} p_j + 1e-12) of every row.

    logits: (B, C), C >= 2, float32, bfloat16, float16 or float64, any strides. labels: (B,) int64, any stride.
    Returns (B,) float32 (float64 for float64 logits), at least -9.9995e-5. -log p_y comes from the log-softmax
    and the second term is at most 9.2103, so the loss is finite for finite logits. Differentiable once in the
    logits; at a tie for the runner-up the first class takes its gradient. A row with a NaN or +inf logit, of -inf
    only, or with a label outside [0, C) gives NaN. Raises ValueError or TypeError for other shapes, types or mixed
    devices.
    Source: MART, its official code's constants.
    """
    check_logits(logits, labels)
    return BOOSTED_CE(logits, labels)
