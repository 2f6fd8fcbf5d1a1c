"""What the ops over rows of logits share: reference pieces, Triton tiles, launch arguments, samples.

A Triton program holds several whole rows in registers. Every op is computed in float32 (float64 for float64
logits) whatever the type of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import Compile, check_device, check_logits, check_tensors, compute_dtype, tl, triton


# reference ---------------------------------------------------------------------------------------------------
def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, C) boolean; a row of False for a label outside [0, C)."""
    return labels[:, None] == torch.arange(classes, device=labels.device)


def poison(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """NaN in the rows whose label is outside [0, C)."""
    valid = (labels >= 0) & (labels < classes)
    return torch.where(valid.view(-1, *(1,) * (values.dim() - 1)), values, torch.nan)


def runner_up(logits: Tensor, own: Tensor) -> Tensor:
    """(B, C) boolean: the first class, other than the true one, with the largest logit."""
    others = logits.masked_fill(own, -torch.inf)
    # at an all -inf remainder argmax may fall on the true class; the first other class is meant
    first_other = own[:, :1].long().squeeze(1)
    best = torch.where(others.amax(1) == -torch.inf, first_other, others.argmax(1))
    return one_hot(best, logits.shape[1])


def pick(values: Tensor, chosen: Tensor) -> Tensor:
    """(B,) the value where `chosen`, a boolean with at most one True a row, holds; else 0."""
    return torch.where(chosen, values, 0).sum(1)


def check_pair(**named: Tensor) -> None:
    """Refuse two matrices that are no logits, or that differ in shape, type or device (no synchronisation)."""
    check_tensors(**named)
    logits, other = named.values()
    check_logits(logits)
    if other.shape != logits.shape:
        raise ValueError(f"logits of two shapes: {tuple(logits.shape)} and {tuple(other.shape)}")
    if other.dtype != logits.dtype:
        raise TypeError(f"logits of two types: {logits.dtype} and {other.dtype}")
    check_device(logits, other)


def split(p: Tensor, own: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """(B, 1) each: p of the true class, of the runner-up, and the sum over the rest.

    Gradients are written in these three because 1 - p, for a p near 1, would lose its digits.
    """
    return tuple(torch.where(chosen, p, 0).sum(1, keepdim=True) for chosen in (own, other, ~(own | other)))


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def tile(batch, classes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows (64-bit), the columns, and where both lie inside the matrix."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    return row, column, (row < batch)[:, None] & (column < classes)[None, :]


@triton.jit
def load_logits(logits_ptr, row, column, inside, stride_b, stride_c):
    """Rows of logits in float32, -inf past the last class."""
    offset = row[:, None] * stride_b + column[None, :].to(tl.int64) * stride_c
    return tl.load(logits_ptr + offset, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def load_labels(labels_ptr, row, column, label_stride, batch, classes):
    """Boolean tile of the true class, and which labels lie in [0, C)."""
    y = tl.load(labels_ptr + row * label_stride, mask=row < batch, other=0)
    return column[None, :] == y[:, None], (y >= 0) & (y < classes)


@triton.jit
def store_rows(out_ptr, values, row, column, inside, classes):
    """Write a tile to a contiguous (B, C) tensor."""
    offset = row[:, None] * classes + column[None, :]
    tl.store(out_ptr + offset, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_rows(z, inside):
    """exp(z - max) with 0 outside, its sum, and the max; a NaN or +inf logit makes the sum NaN."""
    top = tl.max(z, 1)
    e = tl.where(inside, tl.exp(z - top[:, None]), 0.0)
    return e, tl.sum(e, 1), top


@triton.jit
def first_largest_rows(z, column, among):
    """Boolean tile: the first class of those in `among` with the largest logit; and that logit."""
    best = tl.max(tl.where(among, z, float("-inf")), 1)
    first = tl.min(tl.where(among & (z == best[:, None]), column[None, :], 2147483647), 1)
    return column[None, :] == first[:, None], best


@triton.jit
def pick_rows(values, chosen):
    """The value where `chosen`, true at most once a row, holds; else 0."""
    return tl.sum(tl.where(chosen, values, 0.0), 1)


@triton.jit
def split_rows(p, own, other):
    """(ROWS, 1) each: p of the true class, of the runner-up, and the sum over the rest."""
    rest = tl.where(own | other, 0.0, p)
    return pick_rows(p, own)[:, None], pick_rows(p, other)[:, None], tl.sum(rest, 1)[:, None]


@triton.jit
def poisoned_rows(z, inside):
    """Whether a row holds NaN or +inf."""
    return tl.max((inside & ((z < float("inf")) == 0)).to(tl.int32), 1) > 0


# launchers ---------------------------------------------------------------------------------------------------
def tile_launch(logits: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, and the shape of a tile of about 512 values."""
    batch, classes = logits.shape
    block = triton.next_power_of_2(classes)
    rows = max(1, min(32, 512 // block))
    warps = max(4, min(16, block // 512))
    return (triton.cdiv(batch, rows),), dict(batch=batch, classes=classes, ROWS=rows, BLOCK=block, num_warps=warps)


def run_rows(kernel: Any, out: Tensor, logits: Tensor, labels: Tensor | None = None, **others: Any) -> Tensor:
    """`out`, filled by a kernel over logits, and labels where it takes them; others: what else it takes."""
    if out.numel():
        grid, shape = tile_launch(logits)
        if labels is not None:
            shape |= dict(labels_ptr=labels, label_stride=labels.stride(0))
        strides = dict(stride_b=logits.stride(0), stride_c=logits.stride(1))
        kernel[grid](out_ptr=out, logits_ptr=logits, **strides, **shape, **others)
    return out


def pair_launch(p: Tensor, q: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, and the arguments that every kernel over two matrices of logits takes."""
    grid, shape = tile_launch(p)
    return grid, dict(
        p_ptr=p,
        q_ptr=q,
        p_stride_b=p.stride(0),
        p_stride_c=p.stride(1),
        q_stride_b=q.stride(0),
        q_stride_c=q.stride(1),
        **shape,
    )


# registration ------------------------------------------------------------------------------------------------
def logit_samples(device: torch.device, least: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels: empty, one row, `least` classes, odd sizes, 200 classes, large values, half types."""
    generator = torch.Generator().manual_seed(0)
    for batch, classes, dtype, scale in (
        (0, 10, torch.float32, 1.0),
        (1, least, torch.float32, 3.0),
        (5, 3, torch.float64, 1.0),
        (128, 10, torch.float32, 4.0),
        (33, 200, torch.float32, 30.0),
        (7, 17, torch.bfloat16, 2.0),
        (9, 10, torch.float16, 2.0),
    ):
        logits = (scale * torch.randn(batch, classes, generator=generator)).to(dtype)
        labels = torch.randint(classes, (batch,), generator=generator)
        yield logits.to(device), labels.to(device)


def pair_samples(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Two matrices of logits a sample, a little apart."""
    for logits, _ in logit_samples(device):
        yield logits, (0.8 * logits + 0.3 * logits.roll(1, 1)).to(logits.dtype)


def with_grad(samples: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Samples of the op's backward: a gradient a row before the op's own arguments."""
    for first, *rest in samples:
        grad = torch.linspace(-1, 1, len(first), device=first.device, dtype=compute_dtype(first.dtype))
        yield grad, first, *rest


def save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """The setup_context of an op over logits and labels whose backward needs both."""
    ctx.save_for_backward(*inputs)


def row_fake(logits: Tensor, *others: Any) -> Tensor:
    """One value a row, in the compute type."""
    return logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))


def like_fake(logits: Tensor, *others: Any) -> Tensor:
    """A contiguous tensor of the logits' shape and type."""
    return logits.new_empty(logits.shape)


def row_bytes(logits: Tensor, *others: Any) -> int:
    """Logits read, and labels where there are any, one value a row written."""
    labels = sum(8 * len(other) for other in others if isinstance(other, Tensor))
    return logits.numel() * logits.element_size() + labels + len(logits) * compute_dtype(logits.dtype).itemsize


def grad_bytes(logits: Tensor, labels: Tensor, *scalars: float) -> int:
    """Logits and labels read, a gradient written."""
    return 2 * logits.numel() * logits.element_size() + len(labels) * 8


def row_compile(kernel: Any, constants: dict[str, Any] | None = None, **types: str) -> tuple[Compile, ...]:
    """Ahead-of-time types of a kernel over rows: 10 classes in float32 and 1000 in bfloat16.

    types: the arguments beyond those of `run_rows` or `pair_launch`; {t} stands for the logits' type.
    """
    common = {name: "*{t}" for name in ("logits_ptr", "p_ptr", "q_ptr")} | {"labels_ptr": "*i64"}
    common |= dict.fromkeys(("batch", "classes", "stride_b", "stride_c", "label_stride", "grad_stride"), "i32")
    common |= dict.fromkeys(("p_stride_b", "p_stride_c", "q_stride_b", "q_stride_c"), "i32")
    names = kernel.arg_names
    signature = {name: type_ for name, type_ in (common | types).items() if name in names}
    return tuple(
        Compile(
            kernel=kernel,
            signature={name: type_.format(t=t) for name, type_ in signature.items()},
            constants={**(constants or {}), "ROWS": rows, "BLOCK": block},
        )
        for t, rows, block in (("fp32", 32, 16), ("bf16", 1, 1024))
    )
