"""The convolution of channels-last images as an implicit matrix product, in Triton, with its end in the same pass.

One kernel serves forward and backward: the input's gradient is a convolution of the output's, whose elements stand
a stride apart, with the weights turned around.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from mwpb_kernels.op import tl, triton

BLOCK_K = 32  # input channels of a program at a time
WIDEST = 64  # output channels of a program


def block_m(apart: int, itemsize: int = 2) -> int:
    """Positions of a program: fewer where there is more to reckon for each, or to hold."""
    return 128 if apart == 1 and itemsize == 2 else 64


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def relu_and_gate(sums, at, inside, byte, byte_there, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store relu(sums), and of each eight channels one byte, in which bits are set where it is not 0."""
    out = tl.where(sums <= 0, 0.0, sums).to(at.dtype.element_ty)
    tl.store(at, out, mask=inside)
    is_open = tl.where(inside & (out.to(tl.float32) != 0), 1, 0)
    bits = tl.reshape(is_open, (BLOCK_M, BLOCK_N // 8, 8)) << tl.arange(0, 8)[None, None, :]
    tl.store(byte, tl.sum(bits, axis=2).to(tl.uint8), mask=byte_there)


@triton.jit
def _conv_kernel(
    out_ptr,  # (B, height, width, N)
    x_ptr,  # (B, rows, columns, K)
    weight_ptr,  # (O, KERNEL, KERNEL, I): N and K are O and I, or I and O
    bias_ptr,  # (N,)
    other_ptr,  # as out
    gate_ptr,  # (B, height, width, groups)
    positions,  # B * height * width
    height,
    width,
    rows,
    columns,
    n_size,
    k_size,
    groups,
    weight_n,
    weight_k,
    weight_tap,
    bias_stride,
    offset,
    STRIDE: tl.constexpr,
    APART: tl.constexpr,
    BACKWARD: tl.constexpr,
    OTHER: tl.constexpr,
    GATED: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(n_size, BLOCK_N)
    m = program // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at, y_at, image = m % width, m // width % height, m // width // height
    blocks = tl.cdiv(k_size, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(KERNEL * KERNEL * blocks):
        tap = (i // blocks).to(tl.int64)
        k = (i % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        down, right = tap // KERNEL, tap % KERNEL
        if BACKWARD:
            y, x = y_at + offset - down, x_at + offset - right
        else:
            y, x = y_at * STRIDE - offset + down, x_at * STRIDE - offset + right
        there = (m < positions) & (y >= 0) & (x >= 0)
        if APART > 1:
            there = there & (y % APART == 0) & (x % APART == 0)
            y, x = y // APART, x // APART
        there = there & (y < rows) & (x < columns)
        from_x = x_ptr + ((image * rows + y) * columns + x)[:, None] * k_size + k[None, :]
        a = tl.load(from_x, mask=there[:, None] & (k < k_size)[None, :], other=0.0)
        from_weight = weight_ptr + tap * weight_tap + k[:, None] * weight_k + n[None, :] * weight_n
        b = tl.load(from_weight, mask=(k < k_size)[:, None] & (n < n_size)[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    at = m[:, None] * n_size + n[None, :]
    inside = (m < positions)[:, None] & (n < n_size)[None, :]
    group = program % across * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    byte = gate_ptr + m[:, None] * groups + group[None, :]
    byte_there = (m < positions)[:, None] & (group < groups)[None, :]
    if not BACKWARD:
        sums += tl.load(bias_ptr + n * bias_stride, mask=n < n_size, other=0.0)[None, :]
    if OTHER:
        sums += tl.load(other_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        if GATED:
            bits = (
                tl.load(byte, mask=byte_there, other=0).to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
            )
            sums = tl.where(tl.reshape(bits & 1, (BLOCK_M, BLOCK_N)) != 0, sums, 0.0)
        tl.store(out_ptr + at, sums, mask=inside)
    else:
        relu_and_gate(sums, out_ptr + at, inside, byte, byte_there, BLOCK_M, BLOCK_N)


# launcher ---------------------------------------------------------------------------------------------------
def last(t: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as (B, H, W, C), dense: what lies so is not copied."""
    return t.permute(0, 2, 3, 1).contiguous()


def launch(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, backward: bool, **arguments: Any) -> None:
    """out: (B, H, W, N), x: (B, H, W, K), dense; weight: (O, I, k, k)."""
    weights = last(weight)
    inputs, kernel = weight.shape[1], weight.shape[2]
    positions, outputs = out.numel() // out.shape[3], out.shape[3]
    wide = max(16, min(WIDEST, triton.next_power_of_2(outputs)))
    block = block_m(arguments["APART"], x.element_size())
    grid = (triton.cdiv(positions, block) * triton.cdiv(outputs, wide),)
    _conv_kernel[grid](
        out_ptr=out,
        x_ptr=x,
        weight_ptr=weights,
        positions=positions,
        height=out.shape[1],
        width=out.shape[2],
        rows=x.shape[1],
        columns=x.shape[2],
        n_size=outputs,
        k_size=x.shape[3],
        groups=(outputs + 7) // 8,
        weight_n=1 if backward else inputs * kernel * kernel,
        weight_k=inputs * kernel * kernel if backward else 1,
        weight_tap=inputs,
        BACKWARD=backward,
        KERNEL=kernel,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",  # the half types are multiplied exactly
        WIDEN=os.environ.get("TRITON_INTERPRET") == "1",  # it would multiply the bits of bfloat16 as numbers
        BLOCK_M=block,
        BLOCK_N=wide,
        BLOCK_K=BLOCK_K,
        num_warps=8,
        num_stages=3,  # loads that are on their way while products are made
        **arguments,
    )
