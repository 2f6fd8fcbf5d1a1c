"""relu(x * scale + bias) for each channel, in one pass: an eval-mode batch norm and its ReLU, frozen.

The input's gradient is the whole backward: its mask is the sign of the output, so the input is not kept.
Computed in float32 (float64 for float64 input) and rounded once; differentiable once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import (
    LOGIT_DTYPES,
    Compile,
    Op,
    check_device,
    check_tensors,
    compute_dtype,
    in_layout_of,
    tl,
    triton,
)

# A program holds so many elements, 16 for each thread of its four warps.
TILE = 2048


# reference ---------------------------------------------------------------------------------------------------
def by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) as (C, 1, ..., 1), to broadcast over (B, C, ...)."""
    return values.view(-1, *(1,) * (x.dim() - 2))


def scale_bias_relu_reference(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    sums = x.to(compute_dtype(x.dtype)) * by_channel(scale, x) + by_channel(bias, x)
    return in_layout_of(x, torch.relu(sums))


@torch.no_grad()
def scale_bias_relu_backward_reference(grad: Tensor, out: Tensor, scale: Tensor) -> Tensor:
    result = grad.to(compute_dtype(out.dtype)) * by_channel(scale, out)
    return in_layout_of(out, torch.where(out <= 0, 0, result))


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def tile_of(rows, columns, channels, CHANNEL_A_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets and channels of this program's elements in a dense matrix, and which of both there are."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(columns, COLUMNS)
    row = (program // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (program % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    channel = row % channels if CHANNEL_A_ROW else column
    return row * columns + column, channel, (row < rows) & (column < columns), channel < channels


@triton.jit
def _scale_bias_relu_kernel(
    out_ptr,  # rows x columns, dense
    x_ptr,  # as out
    scale_ptr,  # (C,)
    bias_ptr,  # (C,)
    rows, columns, channels, scale_stride, bias_stride,
    CHANNEL_A_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at, channel, inside, known = tile_of(rows, columns, channels, CHANNEL_A_ROW, ROWS, COLUMNS)
    scale = tl.load(scale_ptr + channel * scale_stride, mask=known)
    bias = tl.load(bias_ptr + channel * bias_stride, mask=known)
    v = tl.load(x_ptr + at, mask=inside).to(tl.float32) * scale + bias
    tl.store(out_ptr + at, tl.where(v <= 0, 0.0, v), mask=inside)


@triton.jit
def _scale_bias_relu_backward_kernel(
    result_ptr,  # rows x columns, dense
    grad_ptr,  # as result
    out_ptr,  # as result
    scale_ptr,  # (C,)
    rows, columns, channels, scale_stride,
    CHANNEL_A_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at, channel, inside, known = tile_of(rows, columns, channels, CHANNEL_A_ROW, ROWS, COLUMNS)
    scale = tl.load(scale_ptr + channel * scale_stride, mask=known)
    out = tl.load(out_ptr + at, mask=inside).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=inside).to(tl.float32) * scale
    tl.store(result_ptr + at, tl.where(out <= 0, 0.0, g), mask=inside)


# launchers ---------------------------------------------------------------------------------------------------
def matrix(like: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of a dense (B, C, ...) tensor as a matrix, in the order of its memory.

    Its channels are the columns where they lie side by side, as in channels-last memory; else a row is what
    lies together of one channel.
    """
    channels = like.shape[1]
    inner = like.stride(1) if channels > 1 else like.numel()
    columns = channels if inner == 1 else inner
    rows = like.numel() // columns
    wide = min(TILE, triton.next_power_of_2(columns))
    arguments = dict(
        rows=rows,
        columns=columns,
        channels=channels,
        CHANNEL_A_ROW=columns != channels or inner != 1,
        ROWS=TILE // wide,
        COLUMNS=wide,
        enable_fp_fusion=False,  # the product rounds before the sum, as in the reference
    )
    return (triton.cdiv(rows, TILE // wide) * triton.cdiv(columns, wide),), arguments


def lying_as(t: Tensor, like: Tensor) -> Tensor:
    """t in the memory layout of `like`, which is dense."""
    same = all(a == b for a, b, n in zip(t.stride(), like.stride(), t.shape, strict=True) if n > 1)
    return t if same else torch.empty_like(like, dtype=t.dtype).copy_(t)


def scale_bias_relu_triton(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    out = like_fake(x)
    if out.numel():
        grid, arguments = matrix(out)
        _scale_bias_relu_kernel[grid](
            out_ptr=out,
            x_ptr=lying_as(x, out),
            scale_ptr=scale,
            bias_ptr=bias,
            scale_stride=scale.stride(0),
            bias_stride=bias.stride(0),
            **arguments,
        )
    return out


def scale_bias_relu_backward_triton(grad: Tensor, out: Tensor, scale: Tensor) -> Tensor:
    result = like_fake(out)
    if result.numel():
        grid, arguments = matrix(result)
        _scale_bias_relu_backward_kernel[grid](
            result_ptr=result,
            grad_ptr=lying_as(grad, result),
            out_ptr=lying_as(out, result),
            scale_ptr=scale,
            scale_stride=scale.stride(0),
            **arguments,
        )
    return result


# registration ------------------------------------------------------------------------------------------------
def like_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def channel_samples(device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """x, scale and bias: empty, one element, odd sizes, all types, a ResNet's shape in its layout."""
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in (
        ((0, 3, 4, 4), torch.float32),
        ((2, 4, 0), torch.float32),
        ((1, 1), torch.float32),
        ((5, 33), torch.float32),
        ((3, 5, 7, 3), torch.bfloat16),
        ((2, 6, 3, 5), torch.float16),
        ((2, 3, 2, 3, 5), torch.float32),
        ((3, 2, 5, 4), torch.float64),
        ((7, 64, 8, 8), torch.bfloat16),
        ((2, 3, 53, 67), torch.float32),
        ((128, 64, 8, 8), torch.bfloat16),
    ):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if len(shape) == 4:  # the layout that training uses
            x = x.contiguous(memory_format=torch.channels_last)
        scale = 0.5 + torch.rand(shape[1], generator=generator, dtype=torch.float64)
        scale[::3] *= -1
        bias = 0.1 * torch.randn(shape[1], generator=generator, dtype=torch.float64)
        yield tuple(t.to(device) for t in (x, *(v.to(compute_dtype(dtype)) for v in (scale, bias))))


def grad_samples(device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Gradient, output and scale, for every sample of the forward op; every other gradient in x's layout."""
    for number, (x, scale, bias) in enumerate(channel_samples(device)):
        out = scale_bias_relu_reference(x, scale, bias)
        grad = torch.linspace(-1, 2, x.numel(), device=device).to(x.dtype).view(x.shape)
        yield torch.empty_like(x).copy_(grad) if number % 2 == 0 else grad, out, scale


def _entries(kernel: Any, more: dict[str, str], *images: str) -> tuple[Compile, ...]:
    sizes = dict.fromkeys(("rows", "columns", "channels", "scale_stride"), "i32")
    return tuple(
        Compile(
            kernel=kernel,
            signature=dict.fromkeys(images, f"*{t}") | {"scale_ptr": "*fp32"} | sizes | more,
            constants={"CHANNEL_A_ROW": a_row, "ROWS": TILE // wide, "COLUMNS": wide},
        )
        for t, a_row, wide in (("fp32", False, 64), ("bf16", False, 64), ("fp16", True, 1024), ("fp32", True, 8))
    )


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return SCALE_BIAS_RELU_BACKWARD(grad, *ctx.saved_tensors), None, None


SCALE_BIAS_RELU_BACKWARD = Op(
    schema="scale_bias_relu_backward(Tensor grad, Tensor out, Tensor scale) -> Tensor",
    reference=scale_bias_relu_backward_reference,
    fake=lambda grad, out, scale: like_fake(out),
    triton=scale_bias_relu_backward_triton,
    samples=grad_samples,
    bytes_moved=lambda grad, out, scale: 3 * out.nbytes + scale.nbytes,
    compiles=_entries(_scale_bias_relu_backward_kernel, {}, "result_ptr", "grad_ptr", "out_ptr"),
)
SCALE_BIAS_RELU = Op(
    schema="scale_bias_relu(Tensor x, Tensor scale, Tensor bias) -> Tensor",
    reference=scale_bias_relu_reference,
    fake=lambda x, scale, bias: like_fake(x),
    triton=scale_bias_relu_triton,
    setup_context=_save_for_backward,
    backward=_backward,
    differentiable=(0,),
    samples=channel_samples,
    bytes_moved=lambda x, scale, bias: 2 * x.nbytes + scale.nbytes + bias.nbytes,
    compiles=_entries(_scale_bias_relu_kernel, {"bias_ptr": "*fp32", "bias_stride": "i32"}, "out_ptr", "x_ptr"),
)


# public function ---------------------------------------------------------------------------------------------
def scale_bias_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """relu(x * scale + bias), with one scale and one bias for each channel.

    x: (B, C, ...) float32, bfloat16, float16 or float64, any strides. scale, bias: (C,) float32 (float64 beside
    float64 x), any stride. Returns a new tensor with x's layout and type, rounded once. Differentiable once, in x
    alone: scale and bias are constants, as those of a frozen network are. The gradient is 0 where the output
    is, as torch.relu's; NaN in x, scale or bias gives NaN. Raises ValueError or TypeError for other shapes, types
    or mixed devices, and for a scale or bias that requires grad while grad mode is on.
    An eval-mode batch norm is this with scale = weight / sqrt(running_var + eps) and bias = its bias -
    running_mean * scale (Ioffe and Szegedy, 2015).
    """
    check_tensors(x=x, scale=scale, bias=bias)
    if x.dim() < 2:
        raise ValueError(f"x must be (B, C, ...), not {tuple(x.shape)}")
    if x.dtype not in LOGIT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    for name, values in (("scale", scale), ("bias", bias)):
        if values.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be ({x.shape[1]},), not {tuple(values.shape)}")
        if values.dtype != compute_dtype(x.dtype):
            raise TypeError(f"{name} must be {compute_dtype(x.dtype)} beside {x.dtype} x, not {values.dtype}")
        if torch.is_grad_enabled() and values.requires_grad:
            raise ValueError(f"{name} requires grad, but the gradient is in x alone: pass {name}.detach()")
    check_device(x, scale, bias)
    return SCALE_BIAS_RELU(x, scale, bias)
