"""Probability margin and the per-sample radii that MWPB derives from the logits of the natural images.

margin m = p_y - max_{j != y} p_j and radius = exp(alpha * m) * eps: Eq. 2 and 3 of the MWPB paper. One pass
over the logits; computed in float32 (float64 for float64 logits) whatever their type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mwpb_kernels.op import Compile, Op, check_logits, compute_dtype, tl, triton


# reference ---------------------------------------------------------------------------------------------------
def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """(B, C) boolean; a row of False for a label outside [0, C)."""
    return labels[:, None] == torch.arange(classes, device=labels.device)


def poison(values: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """NaN in the rows whose label is outside [0, C)."""
    valid = (labels >= 0) & (labels < classes)
    return torch.where(valid.view(-1, *(1,) * (values.dim() - 1)), values, torch.nan)


def runner_up(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """(B, C) boolean: the first class, other than the true one, with the largest logit."""
    others = logits.masked_fill(own, -torch.inf)
    # at an all -inf remainder argmax may fall on the true class; the first other class is meant
    first_other = own[:, :1].long().squeeze(1)
    best = torch.where(others.amax(1) == -torch.inf, first_other, others.argmax(1))
    return one_hot(best, logits.shape[1])


def margin_reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    own = one_hot(labels, z.shape[1])
    p = torch.softmax(z, dim=1)
    picked = torch.where(own, p, 0).sum(1) - torch.where(runner_up(z, own), p, 0).sum(1)
    return poison(picked + 0 * p.sum(1), labels, z.shape[1])


@torch.no_grad()
def margin_radius_reference(
    logits: torch.Tensor, labels: torch.Tensor, eps: float, alpha: float
) -> torch.Tensor:
    return torch.exp(alpha * margin_reference(logits, labels)) * eps


@torch.no_grad()
def deviation_radius_reference(
    logits: torch.Tensor, labels: torch.Tensor, eps: float, alpha: float
) -> torch.Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    p = torch.softmax(z, dim=1)
    centred = p - 1.0 / z.shape[1]
    deviation = centred.square().mean(1).sqrt()
    distance = torch.where(one_hot(labels, z.shape[1]), centred, 0).sum(1)
    score = torch.where(deviation == 0, 0, distance / deviation)
    return poison(torch.exp(alpha * score) * eps, labels, z.shape[1])


def margin_backward_reference(
    grad: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    own = one_hot(labels, z.shape[1])
    p = torch.softmax(z, dim=1)
    signed = torch.where(own, p, 0) - torch.where(runner_up(z, own), p, 0)
    result = grad[:, None] * (signed - p * signed.sum(1, keepdim=True))
    return poison(result, labels, z.shape[1]).to(logits.dtype)


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def load_rows(
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch,
    classes,
    stride_b,
    stride_c,
    label_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of logits in float32 (-inf past the last class) and what every logit op needs of them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    y = tl.load(labels_ptr + row * label_stride, mask=row < batch, other=0)
    inside = (row < batch)[:, None] & (column < classes)[None, :]
    offset = row[:, None] * stride_b + column[None, :].to(tl.int64) * stride_c
    z = tl.load(logits_ptr + offset, mask=inside, other=float("-inf")).to(tl.float32)
    own = column[None, :] == y[:, None]
    valid = (y >= 0) & (y < classes)
    return row, column, inside, z, y, own, valid


@triton.jit
def softmax_rows(z, inside):
    """exp(z - max) with 0 outside, and its sum; a NaN or +inf logit makes the sum NaN."""
    top = tl.max(z, 1)
    e = tl.where(inside, tl.exp(z - top[:, None]), 0.0)
    return e, tl.sum(e, 1)


@triton.jit
def runner_up_rows(z, column, inside, own):
    """Boolean tile: the first class other than the true one with the largest logit."""
    others = tl.where(inside & (own == 0), z, float("-inf"))
    best = tl.max(others, 1)
    at_best = inside & (own == 0) & (others == best[:, None])
    first = tl.min(tl.where(at_best, column[None, :], 2147483647), 1)
    return column[None, :] == first[:, None]


@triton.jit
def _radius_kernel(
    out_ptr,  # (B,)
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch,
    classes,
    stride_b,
    stride_c,
    label_stride,
    eps,
    alpha,
    SCORE: tl.constexpr,  # "margin": the margin itself; "margin_radius", "deviation_radius": the radius
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside, z, y, own, valid = load_rows(
        logits_ptr, labels_ptr, batch, classes, stride_b, stride_c, label_stride, ROWS, BLOCK
    )
    e, total = softmax_rows(z, inside)
    if SCORE == "deviation_radius":
        mean = 1.0 / classes
        centred = tl.where(inside, e / total[:, None] - mean, 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, 1) / classes)
        distance = tl.sum(tl.where(own, centred, 0.0), 1)
        score = tl.where(deviation == 0.0, 0.0, distance / deviation)
    else:
        second = runner_up_rows(z, column, inside, own)
        score = (tl.sum(tl.where(own, e, 0.0), 1) - tl.sum(tl.where(second, e, 0.0), 1)) / total
    if SCORE != "margin":
        score = tl.exp(alpha * score) * eps
    score = tl.where(valid, score, float("nan"))
    tl.store(out_ptr + row, score, mask=row < batch)


@triton.jit
def _margin_backward_kernel(
    out_ptr,  # (B, C) contiguous
    grad_ptr,  # (B,)
    logits_ptr,  # (B, C)
    labels_ptr,  # (B,) int64
    batch,
    classes,
    stride_b,
    stride_c,
    label_stride,
    grad_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside, z, y, own, valid = load_rows(
        logits_ptr, labels_ptr, batch, classes, stride_b, stride_c, label_stride, ROWS, BLOCK
    )
    e, total = softmax_rows(z, inside)
    p = e / total[:, None]
    second = runner_up_rows(z, column, inside, own)
    signed = tl.where(own, p, 0.0) - tl.where(second, p, 0.0)
    grad = tl.load(grad_ptr + row * grad_stride, mask=row < batch, other=0.0)
    result = grad[:, None] * (signed - p * tl.sum(signed, 1)[:, None])
    result = tl.where(valid[:, None], result, float("nan"))
    offset = row[:, None] * classes + column[None, :]
    tl.store(out_ptr + offset, result.to(out_ptr.dtype.element_ty), mask=inside)


# launchers ---------------------------------------------------------------------------------------------------
def row_launch(logits: torch.Tensor, labels: torch.Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and the arguments that every kernel over rows of logits takes."""
    batch, classes = logits.shape
    block = triton.next_power_of_2(classes)
    rows = max(1, min(32, 512 // block))
    arguments = dict(
        logits_ptr=logits,
        labels_ptr=labels,
        batch=batch,
        classes=classes,
        stride_b=logits.stride(0),
        stride_c=logits.stride(1),
        label_stride=labels.stride(0),
        ROWS=rows,
        BLOCK=block,
    )
    return (triton.cdiv(batch, rows),), arguments


def _launch_radius(
    score: str, logits: torch.Tensor, labels: torch.Tensor, eps: float, alpha: float
) -> torch.Tensor:
    out = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))
    if out.numel():
        grid, arguments = row_launch(logits, labels)
        _radius_kernel[grid](out_ptr=out, eps=eps, alpha=alpha, SCORE=score, **arguments)
    return out


def margin_triton(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _launch_radius("margin", logits, labels, 1.0, 1.0)


def margin_radius_triton(logits: torch.Tensor, labels: torch.Tensor, eps: float, alpha: float) -> torch.Tensor:
    return _launch_radius("margin_radius", logits, labels, eps, alpha)


def deviation_radius_triton(
    logits: torch.Tensor, labels: torch.Tensor, eps: float, alpha: float
) -> torch.Tensor:
    return _launch_radius("deviation_radius", logits, labels, eps, alpha)


def margin_backward_triton(grad: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    out = logits.new_empty(logits.shape)
    if out.numel():
        grid, arguments = row_launch(logits, labels)
        _margin_backward_kernel[grid](out_ptr=out, grad_ptr=grad, grad_stride=grad.stride(0), **arguments)
    return out


# registration ------------------------------------------------------------------------------------------------
def logit_samples(device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and labels: empty, one row, two classes, odd sizes, 200 classes, large values, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    for batch, classes, dtype, scale in (
        (0, 10, torch.float32, 1.0),
        (1, 2, torch.float32, 3.0),
        (5, 3, torch.float64, 1.0),
        (128, 10, torch.float32, 4.0),
        (33, 200, torch.float32, 30.0),
        (7, 17, torch.bfloat16, 2.0),
        (9, 10, torch.float16, 2.0),
    ):
        logits = (scale * torch.randn(batch, classes, generator=generator)).to(dtype)
        labels = torch.randint(classes, (batch,), generator=generator)
        yield logits.to(device), labels.to(device)


def row_fake(logits: torch.Tensor, labels: torch.Tensor, *scalars: float) -> torch.Tensor:
    """One value a row, in the compute type."""
    return logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))


def row_bytes(logits: torch.Tensor, labels: torch.Tensor, *scalars: float) -> int:
    """Logits and labels read, one value a row written."""
    return logits.numel() * logits.element_size() + len(labels) * (8 + compute_dtype(logits.dtype).itemsize)


def row_compile(kernel: Any, constants: dict[str, Any], **pointers_and_scalars: str) -> tuple[Compile, ...]:
    """Ahead-of-time types of a kernel over rows: 10 classes in float32 and 200 in bfloat16."""
    base = dict(labels_ptr="*i64", batch="i32", classes="i32", stride_b="i32", stride_c="i32", label_stride="i32")
    return tuple(
        Compile(
            kernel=kernel,
            signature={**{k: v.format(t=t) for k, v in pointers_and_scalars.items()}, "logits_ptr": f"*{t}", **base},
            constants={**constants, "ROWS": rows, "BLOCK": block},
        )
        for t, rows, block in (("fp32", 32, 16), ("bf16", 2, 256))
    )


def _save_for_backward(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return MARGIN_BACKWARD(grad, *ctx.saved_tensors), None


MARGIN_BACKWARD = Op(
    schema="margin_backward(Tensor grad, Tensor logits, Tensor labels) -> Tensor",
    reference=margin_backward_reference,
    fake=lambda grad, logits, labels: logits.new_empty(logits.shape),
    triton=margin_backward_triton,
    samples=lambda device: (
        (torch.linspace(-1, 1, len(y), device=device, dtype=compute_dtype(z.dtype)), z, y)
        for z, y in logit_samples(device)
    ),
    bytes_moved=lambda grad, logits, labels: 2 * logits.numel() * logits.element_size() + len(labels) * 12,
    compiles=row_compile(
        _margin_backward_kernel, {}, out_ptr="*{t}", grad_ptr="*fp32", grad_stride="i32"
    ),
)
MARGIN = Op(
    schema="margin(Tensor logits, Tensor labels) -> Tensor",
    reference=margin_reference,
    fake=row_fake,
    triton=margin_triton,
    setup_context=_save_for_backward,
    backward=_backward,
    differentiable=(0,),
    samples=logit_samples,
    bytes_moved=row_bytes,
    compiles=row_compile(_radius_kernel, {"SCORE": "margin"}, out_ptr="*fp32", eps="fp32", alpha="fp32"),
)
MARGIN_RADIUS = Op(
    schema="margin_radius(Tensor logits, Tensor labels, float eps, float alpha) -> Tensor",
    reference=margin_radius_reference,
    fake=row_fake,
    triton=margin_radius_triton,
    samples=lambda device: ((z, y, 8 / 255, 0.58) for z, y in logit_samples(device)),
    bytes_moved=row_bytes,
    compiles=row_compile(_radius_kernel, {"SCORE": "margin_radius"}, out_ptr="*fp32", eps="fp32", alpha="fp32"),
)
DEVIATION_RADIUS = Op(
    schema="deviation_radius(Tensor logits, Tensor labels, float eps, float alpha) -> Tensor",
    reference=deviation_radius_reference,
    fake=row_fake,
    triton=deviation_radius_triton,
    samples=lambda device: ((z, y, 8 / 255, 0.3) for z, y in logit_samples(device)),
    bytes_moved=row_bytes,
    compiles=row_compile(
        _radius_kernel, {"SCORE": "deviation_radius"}, out_ptr="*fp32", eps="fp32", alpha="fp32"
    ),
)


# public functions --------------------------------------------------------------------------------------------
def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Probability margin p_y - max_{j != y} p_j of every row, p = softmax(logits).

    logits: (B, C), C >= 2, float32, bfloat16, float16 or float64, any strides. labels: (B,) int64, any stride.
    Returns (B,) in [-1, 1], float32 (float64 for float64 logits). Differentiable once in the logits; at a tie
    for the runner-up the first class takes the gradient. A row with a NaN or +inf logit, or with a label
    outside [0, C), gives NaN. Raises ValueError or TypeError for other shapes, types or mixed devices.
    Source: MWPB, Eq. 2.
    """
    check_logits(logits, labels)
    return MARGIN(logits, labels)


def margin_radius(logits: torch.Tensor, labels: torch.Tensor, eps: float, alpha: float) -> torch.Tensor:
    """MWPB's radius exp(alpha * margin) * eps of every sample, in one pass over the logits.

    logits, labels: as `margin` takes them. eps: the base radius in the images' units (8/255 for images in
    [0, 1]). alpha: how far the margin stretches it; the radius lies in [exp(-alpha), exp(alpha)] * eps.
    Returns (B,) float32 (float64 for float64 logits), a constant: no gradient flows through it.
    Errors and NaN: as `margin`. Source: MWPB, Eq. 3.
    """
    check_logits(logits, labels)
    return MARGIN_RADIUS(logits, labels, eps, alpha)


def deviation_radius(logits: torch.Tensor, labels: torch.Tensor, eps: float, alpha: float) -> torch.Tensor:
    """PROVISIONAL standard-deviation-weighted radius exp(alpha * s) * eps.

    s = (p_y - mean(p)) / std(p), population standard deviation over the classes, p = softmax(logits); s = 0 at
    the uniform distribution. The formula of the paper that names such a radius (arXiv 2403.04070) could not be
    recovered; this reading makes no claim to reproduce it.
    Arguments, result, errors and NaN: as `margin_radius`; here the radius may reach exp(alpha * sqrt(C-1)) * eps.
    """
    check_logits(logits, labels)
    return DEVIATION_RADIUS(logits, labels, eps, alpha)
