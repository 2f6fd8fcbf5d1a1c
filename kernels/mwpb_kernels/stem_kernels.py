"""stem.py's ops in Triton: the convolution that reads the image, and its input's gradient with an attack's step.

A value is the sum of its high and its low part, both in a half type. Forward, the parts are multiplied one after
the other; backward, the low parts of the weights stand in the columns that the few channels leave empty.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from mwpb_kernels.implicit import WIDEST, last, relu_and_gate
from mwpb_kernels.linf import sign
from mwpb_kernels.op import tl, triton
from mwpb_kernels.stem_reference import stem_conv_fake
from mwpb_kernels.strided import clamp_between

BLOCK_M = 64  # positions of a program: with more, rows and masks would not fit into the registers
TAPS = 32  # taps times channels of the image that a program multiplies at a time: all of a 3x3 kernel's
DEEPEST = 32  # channels of the gradient, at a time


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def two_parts(v, high_type: tl.constexpr, WIDEN: tl.constexpr):
    """float32 as the sum of two numbers of that type. WIDEN: for the interpreter, which would multiply the bits of
    bfloat16 as numbers."""
    high = v.to(high_type)
    low = (v - high.to(tl.float32)).to(high_type)
    if WIDEN:
        high, low = high.to(tl.float32), low.to(tl.float32)
    return high, low


@triton.jit
def _stem_conv_kernel(
    out_ptr,  # (B, height, width, N)
    gate_ptr,  # (B, height, width, groups)
    x_ptr,  # (B, CHANNELS, rows, columns)
    weight_ptr,  # (N, KERNEL, KERNEL, CHANNELS)
    bias_ptr,  # (N,)
    positions,  # B * height * width
    height, width, rows, columns, n_size, groups,
    x_b, x_c, x_y, x_x, bias_stride, offset,
    STRIDE: tl.constexpr, CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(n_size, BLOCK_N)
    m = program // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at, y_at = m % width * STRIDE - offset, m // width % height * STRIDE - offset
    corner = x_ptr + (m // width // height * x_b + y_at * x_y + x_at * x_x)[:, None]
    x_at, y_at = x_at.to(tl.int32)[:, None], y_at.to(tl.int32)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, KERNEL * KERNEL * CHANNELS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        exists = k < KERNEL * KERNEL * CHANNELS
        down, right = k // CHANNELS // KERNEL, k // CHANNELS % KERNEL
        y, x = y_at + down.to(tl.int32)[None, :], x_at + right.to(tl.int32)[None, :]
        there = (m < positions)[:, None] & exists[None, :] & (y >= 0) & (x >= 0) & (y < rows) & (x < columns)
        from_x = corner + (k % CHANNELS * x_c + down * x_y + right * x_x)[None, :]
        from_weight = weight_ptr + n[None, :] * (KERNEL * KERNEL * CHANNELS) + k[:, None]
        w = tl.load(from_weight, mask=exists[:, None] & (n < n_size)[None, :], other=0.0)
        most, rest = two_parts(w, tl.bfloat16, WIDEN)
        high, low = two_parts(tl.load(from_x, mask=there, other=0.0), tl.bfloat16, WIDEN)
        sums = tl.dot(low, most, sums)  # the product of both rests is below float32's own rounding of the sum
        sums = tl.dot(high, rest, sums)
        sums = tl.dot(high, most, sums)
    if BIAS:
        sums += tl.load(bias_ptr + n * bias_stride, mask=n < n_size, other=0.0)[None, :]
    at = m[:, None] * n_size + n[None, :]
    inside = (m < positions)[:, None] & (n < n_size)[None, :]
    if RELU:
        group = program % across * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        byte = gate_ptr + m[:, None] * groups + group[None, :]
        byte_there = (m < positions)[:, None] & (group < groups)[None, :]
        relu_and_gate(sums, out_ptr + at, inside, byte, byte_there, BLOCK_M, BLOCK_N)
    else:
        tl.store(out_ptr + at, sums, mask=inside)


@triton.jit
def _stem_step_kernel(
    adv_ptr,  # (B, CHANNELS, height, width) in place
    x_ptr,  # (B, CHANNELS, height, width)
    grad_ptr,  # (B, rows, columns, K)
    weight_ptr,  # (K, KERNEL, KERNEL, CHANNELS)
    radius_ptr,  # (B,)
    step_ptr,  # (B,)
    positions,  # B * height * width
    height, width, rows, columns, k_size,
    adv_b, adv_c, adv_y, adv_x,
    x_b, x_c, x_y, x_x,
    radius_stride, step_stride, offset, lo, hi,
    APART: tl.constexpr, CHANNELS: tl.constexpr, KERNEL: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_at, y_at, image = m % width, m // width % height, m // width // height
    n = tl.arange(0, 2 * BLOCK_C)  # of each channel the high part of its weights, and beside it the low one
    blocks = tl.cdiv(k_size, BLOCK_K)
    sums = tl.zeros((BLOCK_M, 2 * BLOCK_C), tl.float32)
    for i in range(KERNEL * KERNEL * blocks):
        tap = (i // blocks).to(tl.int64)
        k = (i % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        y, x = y_at + offset - tap // KERNEL, x_at + offset - tap % KERNEL
        there = (m < positions) & (y >= 0) & (x >= 0)
        if APART > 1:
            there = there & (y % APART == 0) & (x % APART == 0)
            y, x = y // APART, x // APART
        there = there & (y < rows) & (x < columns)
        from_grad = grad_ptr + ((image * rows + y) * columns + x)[:, None] * k_size + k[None, :]
        a = tl.load(from_grad, mask=there[:, None] & (k < k_size)[None, :], other=0.0)
        from_weight = weight_ptr + (k[:, None] * (KERNEL * KERNEL) + tap) * CHANNELS + (n // 2)[None, :]
        w = tl.load(from_weight, mask=(k < k_size)[:, None] & (n < 2 * CHANNELS)[None, :], other=0.0)
        if SPLIT:
            high, low = two_parts(w, a.dtype, WIDEN)
        else:
            high, low = 0.5 * w, 0.5 * w  # not w and 0, whose product with infinity is none
        if WIDEN:
            a = a.to(tl.float32)
        sums = tl.dot(a, tl.where((n % 2 == 0)[None, :], high, low), sums, input_precision="ieee")
    grad = tl.sum(tl.reshape(sums, (BLOCK_M, BLOCK_C, 2)), axis=2)
    c = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    inside = (m < positions)[:, None] & (c < CHANNELS)
    radius = tl.load(radius_ptr + image * radius_stride, mask=m < positions, other=0.0)[:, None]
    step = tl.load(step_ptr + image * step_stride, mask=m < positions, other=0.0)[:, None]
    adv_at = adv_ptr + (image * adv_b + y_at * adv_y + x_at * adv_x)[:, None] + c * adv_c
    clean_at = x_ptr + (image * x_b + y_at * x_y + x_at * x_x)[:, None] + c * x_c
    clean = tl.load(clean_at, mask=inside, other=0.0)
    moved = tl.load(adv_at, mask=inside, other=0.0) + step * sign(grad)
    inner = clamp_between(moved, clean - radius, clean + radius)
    tl.store(adv_at, clamp_between(inner, lo, hi), mask=inside)


# launchers ---------------------------------------------------------------------------------------------------
def stem_conv_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, gate = stem_conv_fake(x, weight, bias, relu, stride, padding, dtype)
    if out.numel():
        outputs = out.shape[1]
        wide = max(16, min(WIDEST, triton.next_power_of_2(outputs)))
        positions = out.numel() // outputs
        _stem_conv_kernel[(triton.cdiv(positions, BLOCK_M) * triton.cdiv(outputs, wide),)](
            out_ptr=out,
            gate_ptr=gate if relu else out,
            x_ptr=x,
            weight_ptr=last(weight),
            bias_ptr=out if bias is None else bias,
            positions=positions,
            height=out.shape[2],
            width=out.shape[3],
            rows=x.shape[2],
            columns=x.shape[3],
            n_size=outputs,
            groups=gate.shape[3],
            **_strides("x", x),
            bias_stride=0 if bias is None else bias.stride(0),
            offset=padding,
            STRIDE=stride,
            **_shape(weight),
            BIAS=bias is not None,
            RELU=relu,
            BLOCK_M=BLOCK_M,
            BLOCK_N=wide,
            BLOCK_K=TAPS,
            num_warps=8,
        )
    return out, gate


def stem_step_triton(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    radius: torch.Tensor,
    step_size: torch.Tensor,
    stride: int,
    padding: int,
    lo: float,
    hi: float,
) -> None:
    if not x_adv.numel():
        return
    split = grad.dtype != torch.float32
    channels, outputs = x.shape[1], grad.shape[1]
    positions = x.numel() // channels
    _stem_step_kernel[(triton.cdiv(positions, BLOCK_M),)](
        adv_ptr=x_adv,
        x_ptr=x,
        grad_ptr=last(grad),
        weight_ptr=last(weight),
        radius_ptr=radius,
        step_ptr=step_size,
        positions=positions,
        height=x.shape[2],
        width=x.shape[3],
        rows=grad.shape[2],
        columns=grad.shape[3],
        k_size=outputs,
        **_strides("adv", x_adv),
        **_strides("x", x),
        radius_stride=radius.stride(0),
        step_stride=step_size.stride(0),
        offset=padding,
        lo=lo,
        hi=hi,
        APART=stride,
        **_shape(weight),
        SPLIT=split,
        BLOCK_M=BLOCK_M,
        BLOCK_C=max(8, triton.next_power_of_2(channels)),
        BLOCK_K=max(16, min(DEEPEST, triton.next_power_of_2(outputs))),
        num_warps=8,
        num_stages=3,  # loads that are on their way while products are made
    )


def _strides(name: str, t: torch.Tensor) -> dict[str, int]:
    return {f"{name}_{d}": t.stride(i) for i, d in enumerate("bcyx")}


def _shape(weight: torch.Tensor) -> dict[str, Any]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return {"CHANNELS": weight.shape[1], "KERNEL": weight.shape[2], "WIDEN": interpreted}
