"""batch_norm_relu on CUDA: the batch's sums in two steps, and the pass that uses them.

Each program adds up tiles of its own, and a second kernel adds up the programs' sums; nothing is atomic, so the
order of every sum, and with it each bit, follows from the sizes alone.
"""

from __future__ import annotations

from torch import Tensor

from mwpb_kernels.batch_norm_reference import batch_norm_relu_reference, norm_fake
from mwpb_kernels.bias_add_relu import byte_of, element_of, rows_of_channels
from mwpb_kernels.op import tl, triton

TILE = 2048  # elements of a program's step: 16 a thread
PROGRAMS = 512  # that share the sums over a batch: some four a multiprocessor of a large GPU
PARTS, FEW = 128, 8  # partial sums and channels of a step of the program that adds them up


def tiling(channels: int, elements: int = TILE) -> dict[str, int]:
    """Rows and columns of a tile."""
    wide = max(8, min(elements, triton.next_power_of_2(channels)))
    return {"ROWS": elements // wide, "COLUMNS": wide}


def shares(rows: int, tile: dict[str, int], channels: int) -> tuple[int, int, int]:
    """Of sums over the rows: their parts, the tiles that each goes through, the programs across the channels."""
    tiles, across = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["COLUMNS"])
    steps = triton.cdiv(tiles, max(1, PROGRAMS // across))
    return triton.cdiv(tiles, steps), steps, across


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def own_rows(program, rows, steps, ROWS: tl.constexpr):
    """How many rows fall to a program that takes `steps` times ROWS, as float32."""
    return tl.minimum(rows - program * steps * ROWS, steps * ROWS).to(tl.float32)


@triton.jit
def _batch_moments_kernel(
    means_ptr,  # (parts, C)
    squares_ptr,  # (parts, C): sums of the squared distances from each part's own mean
    x_ptr,  # (rows, C)
    rows,
    channels,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(channels, COLUMNS)
    part = program // across
    tile = part * steps * across + program % across
    at, channel, inside = element_of(tile, rows, channels, ROWS, COLUMNS)
    v = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # distances from the mean of the first rows, so that no digits are lost where the mean is large
    there = tl.minimum(rows - part * steps * ROWS, ROWS).to(tl.float32)
    pivot = (tl.sum(v, 0) / there)[None, :]
    apart = tl.where(inside, v - pivot, 0.0)
    total, squares = apart, apart * apart
    for _ in range(1, steps):
        tile += across
        at, _channel, inside = element_of(tile, rows, channels, ROWS, COLUMNS)
        v = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, v - pivot, 0.0)
        total += apart
        squares += apart * apart
    count = own_rows(part, rows, steps, ROWS)
    shift = tl.sum(total, 0)[None, :]
    place, known = part * channels + channel, channel < channels
    tl.store(means_ptr + place, pivot + shift / count, mask=known)
    tl.store(squares_ptr + place, tl.sum(squares, 0)[None, :] - shift * shift / count, mask=known)


@triton.jit
def _batch_statistics_kernel(
    mean_ptr,  # (C,)
    invstd_ptr,  # (C,)
    new_mean_ptr,  # (C,)
    new_var_ptr,  # (C,)
    running_mean_ptr,  # (C,)
    running_var_ptr,  # (C,)
    means_ptr,  # (parts, C)
    squares_ptr,  # (parts, C)
    rows,
    channels,
    parts,
    a_part,  # rows of a part; the last may have fewer
    mean_stride,
    var_stride,
    momentum,
    eps,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < channels
    pivot = tl.load(means_ptr + channel, mask=known, other=0.0)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    squares = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)[:, None]
        inside = (part < parts) & known[None, :]
        place = part * channels + channel[None, :]
        count = tl.minimum(rows - part * a_part, a_part).to(tl.float32)
        apart = tl.load(means_ptr + place, mask=inside, other=0.0) - pivot[None, :]
        apart = tl.where(inside, apart, 0.0)
        total += count * apart
        squares += tl.load(squares_ptr + place, mask=inside, other=0.0) + count * apart * apart
    shift = tl.sum(total, 0) / rows
    square = tl.sum(squares, 0) - rows * shift * shift
    square = tl.where(square < 0, 0.0, square)
    mean = pivot + shift
    tl.store(mean_ptr + channel, mean, mask=known)
    tl.store(invstd_ptr + channel, 1.0 / tl.sqrt(square / rows + eps), mask=known)
    before = tl.load(running_mean_ptr + channel * mean_stride, mask=known)
    tl.store(new_mean_ptr + channel, (1.0 - momentum) * before + momentum * mean, mask=known)
    before = tl.load(running_var_ptr + channel * var_stride, mask=known)
    tl.store(new_var_ptr + channel, (1.0 - momentum) * before + momentum * (square / (rows - 1)), mask=known)


@triton.jit
def _batch_norm_relu_kernel(
    out_ptr,  # (rows, C)
    gate_ptr,  # (rows, groups)
    x_ptr,  # as out
    skip_ptr,  # as out, or anything
    mean_ptr,  # (C,)
    invstd_ptr,  # (C,)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    rows,
    channels,
    groups,
    weight_stride,
    bias_stride,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at, channel, inside = element_of(program, rows, channels, ROWS, COLUMNS)
    known = channel < channels
    mean, invstd = tl.load(mean_ptr + channel, mask=known), tl.load(invstd_ptr + channel, mask=known)
    weight = tl.load(weight_ptr + channel * weight_stride, mask=known)
    bias = tl.load(bias_ptr + channel * bias_stride, mask=known)
    v = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean) * (invstd * weight) + bias
    if SKIP:
        v += tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.where(v <= 0, 0.0, v).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=inside)
    is_open = tl.where(inside & (out.to(tl.float32) != 0), 1, 0)  # what is not 0 is positive, or NaN
    bits = tl.reshape(is_open, (ROWS, COLUMNS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    byte, there = byte_of(gate_ptr, program, rows, channels, groups, ROWS, COLUMNS)
    tl.store(byte, tl.sum(bits, axis=2).to(tl.uint8), mask=there)


# launcher ----------------------------------------------------------------------------------------------------
def batch_norm_relu_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    skip: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not x.numel():
        return batch_norm_relu_reference(x, weight, bias, running_mean, running_var, skip, momentum, eps)
    out, mean, invstd, gate, new_mean, new_var = found = norm_fake(
        x, weight, bias, running_mean, running_var, skip
    )
    images, to, channels = rows_of_channels(x), rows_of_channels(out), x.shape[1]
    rows, tile = x.numel() // channels, tiling(channels)
    parts, steps, across = shares(rows, tile, channels)
    means, squares = (mean.new_empty(parts, channels) for _ in range(2))
    _batch_moments_kernel[(parts * across,)](
        means_ptr=means, squares_ptr=squares, x_ptr=images, rows=rows, channels=channels, steps=steps, **tile
    )
    _batch_statistics_kernel[(triton.cdiv(channels, FEW),)](
        mean_ptr=mean,
        invstd_ptr=invstd,
        new_mean_ptr=new_mean,
        new_var_ptr=new_var,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        means_ptr=means,
        squares_ptr=squares,
        rows=rows,
        channels=channels,
        parts=parts,
        a_part=steps * tile["ROWS"],
        mean_stride=running_mean.stride(0),
        var_stride=running_var.stride(0),
        momentum=momentum,
        eps=eps,
        PARTS=PARTS,
        COLUMNS=FEW,
    )
    _batch_norm_relu_kernel[(triton.cdiv(rows, tile["ROWS"]) * across,)](
        out_ptr=to,
        gate_ptr=gate,
        x_ptr=images,
        skip_ptr=images if skip is None else rows_of_channels(skip),
        mean_ptr=mean,
        invstd_ptr=invstd,
        weight_ptr=weight,
        bias_ptr=bias,
        rows=rows,
        channels=channels,
        groups=gate.shape[-1],
        weight_stride=weight.stride(0),
        bias_stride=bias.stride(0),
        SKIP=skip is not None,
        **tile,
    )
    if to.data_ptr() != out.data_ptr():
        out.copy_(to.movedim(-1, 1))
    return found
