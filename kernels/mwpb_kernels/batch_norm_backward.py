"""batch_norm_relu on CUDA, backward: sums of the gradient in two steps, and the pass that uses them."""

from __future__ import annotations

from torch import Tensor

from mwpb_kernels.batch_norm_forward import FEW, PARTS, TILE, shares, tiling
from mwpb_kernels.batch_norm_reference import backward_fake, batch_norm_relu_backward_reference
from mwpb_kernels.bias_add_relu import byte_of, element_of, rows_of_channels
from mwpb_kernels.op import tl, triton

SUMS_TILE = TILE // 2  # of the sums, which keep two of an element: more would spill registers


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def passed_gate(
    grad_ptr, gate_ptr, at, inside, program, rows, channels, groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """This tile's gradient, 0 where its gate is closed or there is nothing."""
    byte, there = byte_of(gate_ptr, program, rows, channels, groups, ROWS, COLUMNS)
    bits = tl.load(byte, mask=there, other=0).to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    is_open = tl.reshape(bits & 1, (ROWS, COLUMNS)) != 0
    return tl.where(is_open & inside, tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _gradient_sums_kernel(
    of_bias_ptr,  # (parts, C)
    of_weight_ptr,  # (parts, C), not yet times invstd
    grad_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    gate_ptr,  # (rows, groups)
    mean_ptr,  # (C,)
    rows,
    channels,
    groups,
    steps,
    mean_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(channels, COLUMNS)
    part = program // across
    tile = part * steps * across + program % across
    channel = (program % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    known = channel < channels
    mean = tl.load(mean_ptr + channel * mean_stride, mask=known, other=0.0)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, steps):
        at, _channel, inside = element_of(tile, rows, channels, ROWS, COLUMNS)
        g = passed_gate(grad_ptr, gate_ptr, at, inside, tile, rows, channels, groups, ROWS, COLUMNS)
        of_bias += g
        apart = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean
        of_weight += g * apart  # 0 where there is nothing, as g is
        tile += across
    place = part * channels + channel
    tl.store(of_bias_ptr + place, tl.sum(of_bias, 0)[None, :], mask=known)
    tl.store(of_weight_ptr + place, tl.sum(of_weight, 0)[None, :], mask=known)


@triton.jit
def _gradient_totals_kernel(
    of_bias_ptr,  # (C,)
    of_weight_ptr,  # (C,)
    bias_parts_ptr,  # (parts, C)
    weight_parts_ptr,  # (parts, C)
    invstd_ptr,  # (C,)
    channels,
    parts,
    invstd_stride,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < channels
    of_bias = tl.zeros((PARTS, COLUMNS), tl.float32)
    of_weight = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS)).to(tl.int64)[:, None]
        inside = (part < parts) & known[None, :]
        place = part * channels + channel[None, :]
        of_bias += tl.load(bias_parts_ptr + place, mask=inside, other=0.0)
        of_weight += tl.load(weight_parts_ptr + place, mask=inside, other=0.0)
    tl.store(of_bias_ptr + channel, tl.sum(of_bias, 0), mask=known)
    invstd = tl.load(invstd_ptr + channel * invstd_stride, mask=known)
    tl.store(of_weight_ptr + channel, tl.sum(of_weight, 0) * invstd, mask=known)


@triton.jit
def _batch_norm_relu_backward_kernel(
    of_x_ptr,  # (rows, C)
    of_skip_ptr,  # as of_x, or anything
    grad_ptr,  # as of_x
    x_ptr,  # as of_x
    gate_ptr,  # (rows, groups)
    weight_ptr,  # (C,)
    mean_ptr,  # (C,)
    invstd_ptr,  # (C,)
    of_weight_ptr,  # (C,)
    of_bias_ptr,  # (C,)
    rows,
    channels,
    groups,
    weight_stride,
    mean_stride,
    invstd_stride,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at, channel, inside = element_of(program, rows, channels, ROWS, COLUMNS)
    known = channel < channels
    weight = tl.load(weight_ptr + channel * weight_stride, mask=known)
    mean = tl.load(mean_ptr + channel * mean_stride, mask=known)
    invstd = tl.load(invstd_ptr + channel * invstd_stride, mask=known)
    of_bias = tl.load(of_bias_ptr + channel, mask=known) / rows
    of_weight = tl.load(of_weight_ptr + channel, mask=known) / rows
    g = passed_gate(grad_ptr, gate_ptr, at, inside, program, rows, channels, groups, ROWS, COLUMNS)
    normed = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean) * invstd
    tl.store(of_x_ptr + at, (g - of_bias - normed * of_weight) * (weight * invstd), mask=inside)
    if SKIP:
        tl.store(of_skip_ptr + at, g, mask=inside)


# launcher ----------------------------------------------------------------------------------------------------
def batch_norm_relu_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, gate: Tensor, skipped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not x.numel():
        return batch_norm_relu_backward_reference(grad, x, weight, mean, invstd, gate, skipped)
    of_x, of_weight, of_bias, of_skip = found = backward_fake(grad, x, weight, mean, invstd, gate, skipped)
    images, gradient, to, gate = (
        rows_of_channels(x),
        rows_of_channels(grad),
        rows_of_channels(of_x),
        gate.contiguous(),
    )
    to_skip = rows_of_channels(of_skip) if skipped else to
    channels = x.shape[1]
    rows, tile, smaller = x.numel() // channels, tiling(channels), tiling(channels, SUMS_TILE)
    parts, steps, across = shares(rows, smaller, channels)
    bias_parts, weight_parts = (of_bias.new_empty(parts, channels) for _ in range(2))
    sizes = dict(rows=rows, channels=channels, groups=gate.shape[-1])
    _gradient_sums_kernel[(parts * across,)](
        of_bias_ptr=bias_parts,
        of_weight_ptr=weight_parts,
        grad_ptr=gradient,
        x_ptr=images,
        gate_ptr=gate,
        mean_ptr=mean,
        steps=steps,
        mean_stride=mean.stride(0),
        **sizes,
        **smaller,
    )
    _gradient_totals_kernel[(triton.cdiv(channels, FEW),)](
        of_bias_ptr=of_bias,
        of_weight_ptr=of_weight,
        bias_parts_ptr=bias_parts,
        weight_parts_ptr=weight_parts,
        invstd_ptr=invstd,
        channels=channels,
        parts=parts,
        invstd_stride=invstd.stride(0),
        PARTS=PARTS,
        COLUMNS=FEW,
    )
    programs = triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(channels, tile["COLUMNS"])
    _batch_norm_relu_backward_kernel[(programs,)](
        of_x_ptr=to,
        of_skip_ptr=to_skip,
        grad_ptr=gradient,
        x_ptr=images,
        gate_ptr=gate,
        weight_ptr=weight,
        mean_ptr=mean,
        invstd_ptr=invstd,
        of_weight_ptr=of_weight,
        of_bias_ptr=of_bias,
        weight_stride=weight.stride(0),
        mean_stride=mean.stride(0),
        invstd_stride=invstd.stride(0),
        SKIP=skipped,
        **sizes,
        **tile,
    )
    for rows_written, result in ((to, of_x), (to_skip, of_skip)):
        if result.numel() and rows_written.data_ptr() != result.data_ptr():
            result.copy_(rows_written.movedim(-1, 1))
    return found
