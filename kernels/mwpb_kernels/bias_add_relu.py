"""A residual layer's end in one pass, relu(x + bias + skip) in place, and its backward, a + b where that is open.

What the backward must know of a ReLU is one bit an element, its gate, in place of the activations. Computed in
float32 (float64 for float64 tensors), summed from the left, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

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
from mwpb_kernels.scale_bias_relu import by_channel, channel_samples, lying_as

TILE = 2048  # elements of a program: 16 a thread


# reference ---------------------------------------------------------------------------------------------------
def pack(is_open: torch.Tensor) -> torch.Tensor:
    """(B, C, ...) booleans as (B, ..., ceil(C / 8)) bytes: channel c is bit c % 8 of byte c // 8."""
    groups = -(-is_open.shape[1] // 8)
    last = torch.nn.functional.pad(is_open.movedim(1, -1).to(torch.uint8), (0, 8 * groups - is_open.shape[1]))
    bits = torch.arange(8, device=is_open.device, dtype=torch.uint8)
    return (last.view(*last.shape[:-1], groups, 8) << bits).sum(-1, dtype=torch.uint8)


def unpack(gate: torch.Tensor, channels: int) -> torch.Tensor:
    """`pack`'s booleans again."""
    bits = torch.arange(8, device=gate.device, dtype=torch.uint8)
    return ((gate[..., None] >> bits) & 1).flatten(-2)[..., :channels].bool().movedim(-1, 1)


@torch.no_grad()
def bias_add_relu_reference(x: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    sums = x.to(compute_dtype(x.dtype)) + by_channel(bias, x)
    x.copy_(torch.relu(sums if skip is None else sums + skip))
    return pack(~(x <= 0))


@torch.no_grad()
def gated_sum_reference(a: torch.Tensor, b: torch.Tensor | None, gate: torch.Tensor) -> torch.Tensor:
    sums = a if b is None else a.to(compute_dtype(a.dtype)) + b
    return in_layout_of(a, torch.where(unpack(gate, a.shape[1]), sums, 0))


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def byte_of(gate_ptr, program, rows, channels, groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Places of this program's bytes, (ROWS, COLUMNS // 8), and which of them there are."""
    across = tl.cdiv(channels, COLUMNS)
    row = (program // across * ROWS + tl.arange(0, ROWS))[:, None]
    group = (program % across * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8))[None, :]
    return gate_ptr + row * groups + group, (row < rows) & (group < groups)


@triton.jit
def element_of(program, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets and channels of this program's elements in a dense matrix, and which of them there are."""
    across = tl.cdiv(channels, COLUMNS)
    row = (program // across * ROWS + tl.arange(0, ROWS))[:, None]
    channel = (program % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row * channels + channel, channel, (row < rows) & (channel < channels)


@triton.jit
def _bias_add_relu_kernel(
    x_ptr,  # (rows, C) in place
    bias_ptr,  # (C,)
    skip_ptr,  # as x, or anything
    gate_ptr,  # (rows, groups)
    rows,
    channels,
    groups,
    bias_stride,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at, channel, inside = element_of(program, rows, channels, ROWS, COLUMNS)
    bias = tl.load(bias_ptr + channel * bias_stride, mask=channel < channels)
    v = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
    if SKIP:
        v += tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.where(v <= 0, 0.0, v).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + at, out, mask=inside)
    is_open = tl.where(inside & (out.to(tl.float32) != 0), 1, 0)  # what is not 0 is positive, or NaN
    bits = tl.reshape(is_open, (ROWS, COLUMNS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    byte, there = byte_of(gate_ptr, program, rows, channels, groups, ROWS, COLUMNS)
    tl.store(byte, tl.sum(bits, axis=2).to(tl.uint8), mask=there)


@triton.jit
def _gated_sum_kernel(
    out_ptr,  # (rows, C)
    a_ptr,  # as out
    b_ptr,  # as out, or anything
    gate_ptr,  # (rows, groups)
    rows,
    channels,
    groups,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at, _, inside = element_of(program, rows, channels, ROWS, COLUMNS)
    byte, there = byte_of(gate_ptr, program, rows, channels, groups, ROWS, COLUMNS)
    bits = tl.load(byte, mask=there, other=0).to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    is_open = tl.reshape(bits & 1, (ROWS, COLUMNS)) != 0
    v = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BOTH:
        v += tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, tl.where(is_open, v, 0.0), mask=inside)


# launchers ---------------------------------------------------------------------------------------------------
def rows_of_channels(t: torch.Tensor) -> torch.Tensor:
    """A dense tensor (B, ..., C) that is `t` where its channels lie side by side, and else a copy of it."""
    return t.movedim(1, -1).contiguous()


def matrix(rows: torch.Tensor, gate: torch.Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments for a tensor (B, ..., C) and its gate."""
    channels = rows.shape[-1]
    count = rows.numel() // channels
    wide = max(8, min(TILE, triton.next_power_of_2(channels)))
    arguments = dict(
        gate_ptr=gate, rows=count, channels=channels, groups=gate.shape[-1], ROWS=TILE // wide, COLUMNS=wide
    )
    return (triton.cdiv(count, TILE // wide) * triton.cdiv(channels, wide),), arguments


def bias_add_relu_triton(x: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    gate = gate_fake(x, bias, skip)
    if x.numel():
        rows = rows_of_channels(x)
        grid, arguments = matrix(rows, gate)
        _bias_add_relu_kernel[grid](
            x_ptr=rows,
            bias_ptr=bias,
            skip_ptr=rows if skip is None else rows_of_channels(skip),
            bias_stride=bias.stride(0),
            SKIP=skip is not None,
            **arguments,
        )
        if rows.data_ptr() != x.data_ptr():
            x.copy_(rows.movedim(-1, 1))
    return gate


def gated_sum_triton(a: torch.Tensor, b: torch.Tensor | None, gate: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(a)
    if out.numel():
        rows = rows_of_channels(out)
        grid, arguments = matrix(rows, gate.contiguous())
        _gated_sum_kernel[grid](
            out_ptr=rows,
            a_ptr=rows_of_channels(a),
            b_ptr=rows if b is None else rows_of_channels(b),
            BOTH=b is not None,
            **arguments,
        )
        if rows.data_ptr() != out.data_ptr():
            out.copy_(rows.movedim(-1, 1))
    return out


# registration ------------------------------------------------------------------------------------------------
def gate_fake(x: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], (x.shape[1] + 7) // 8), dtype=torch.uint8)


def sum_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """x, bias and skip: those of scale_bias_relu without its scale; one in three without a skip."""
    for number, (x, scale, bias) in enumerate(channel_samples(device)):
        yield x, bias, None if number % 3 == 0 else lying_as(torch.flip(x, (0, 1)), x) * scale.amin().to(x.dtype)


def gate_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Both gradients, or one, and the gate, for every sample of the forward op; one in two as it lies there."""
    for number, (x, bias, skip) in enumerate(sum_samples(device)):
        gate = bias_add_relu_reference(out := x.clone(), bias, skip)
        grad = torch.linspace(-1, 2, x.numel(), device=device).to(x.dtype).view(x.shape)
        yield lying_as(grad, x) if number % 4 < 2 else grad, None if skip is None else out, gate


def cycled(t: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of that shape with t's values, over and over."""
    count = int(torch.Size(shape).numel())
    places = torch.arange(count, device=t.device) % max(1, t.numel())
    return t.flatten()[places].view(shape) if t.numel() else t.new_zeros(shape)


def _entries(kernel: Any, option: str, others: dict[str, str], *images: str) -> tuple[Compile, ...]:
    sizes = dict.fromkeys(("rows", "channels", "groups"), "i32")
    return tuple(
        Compile(
            kernel=kernel,
            signature=dict.fromkeys(images, f"*{t}") | {"gate_ptr": "*u8"} | sizes | others,
            constants={option: both, "ROWS": TILE // wide, "COLUMNS": wide},
        )
        for t, both, wide in (("bf16", True, 64), ("bf16", False, 512), ("fp16", True, 8), ("fp32", False, 64))
    )


BIAS_ADD_RELU = Op(
    schema="bias_add_relu_(Tensor(a!) x, Tensor bias, Tensor? skip) -> Tensor",
    reference=bias_add_relu_reference,
    fake=gate_fake,
    triton=bias_add_relu_triton,
    samples=sum_samples,
    bytes_moved=lambda x, bias, skip: x.nbytes * (2 if skip is None else 3) + x.numel() // 8 + bias.nbytes,
    compiles=_entries(
        _bias_add_relu_kernel, "SKIP", {"bias_ptr": "*fp32", "bias_stride": "i32"}, "x_ptr", "skip_ptr"
    ),
    mutates=(0,),
)
GATED_SUM = Op(
    schema="gated_sum(Tensor a, Tensor? b, Tensor gate) -> Tensor",
    reference=gated_sum_reference,
    fake=lambda a, b, gate: torch.empty_like(a),
    triton=gated_sum_triton,
    samples=gate_samples,
    bytes_moved=lambda a, b, gate: a.nbytes * (2 if b is None else 3) + gate.nbytes,
    compiles=_entries(_gated_sum_kernel, "BOTH", {}, "out_ptr", "a_ptr", "b_ptr"),
    fit=lambda a, b, gate: (a, b, cycled(gate, (a.shape[0], *a.shape[2:], (a.shape[1] + 7) // 8))),
)


# public functions --------------------------------------------------------------------------------------------
def bias_add_relu_(x: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
    """x <- relu(x + bias + skip) in place, with one bias for each channel; returns the gate.

    x: (B, C, ...) float32, bfloat16, float16 or float64, any strides without overlap; fastest on CUDA where its
    channels lie side by side (channels-last). bias: (C,) float32 (float64 beside float64 x), any stride. skip:
    like x in shape and type, any strides, or None. It must not share memory with x.

    The gate is (B, ..., ceil(C / 8)) uint8: bit c % 8 of byte c // 8 is 1 where channel c of the result is not 0,
    which is where the gradient passes; `gated_sum` takes it. A NaN gives NaN, and its gate is open, as the
    gradient of torch.relu has it. No gradient flows through the op. Raises ValueError or TypeError for other
    shapes, types or mixed devices, and for an x that is expanded or that requires grad while grad mode is on.
    """
    check_tensors(x=x, bias=bias)
    _check_images(x, "x", skip, "skip")
    if bias.shape != x.shape[1:2]:
        raise ValueError(f"bias must be ({x.shape[1]},), not {tuple(bias.shape)}")
    if bias.dtype != compute_dtype(x.dtype):
        raise TypeError(f"bias must be {compute_dtype(x.dtype)} beside {x.dtype} x, not {bias.dtype}")
    check_device(x, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x requires grad and is written in place: pass x.detach()")
    if x.numel() and any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError("x is expanded, so its elements share memory: pass x.contiguous()")
    return BIAS_ADD_RELU(x, bias, skip)


def gated_sum(a: torch.Tensor, b: torch.Tensor | None, gate: torch.Tensor) -> torch.Tensor:
    """a + b where the gate is open, else 0: the gradient in front of a ReLU from the two behind it.

    a: (B, C, ...) float32, bfloat16, float16 or float64, any strides. b: like a in shape and type, any strides,
    or None. gate: (B, ..., ceil(C / 8)) uint8, as `bias_add_relu_` gives it. Returns a new tensor in a's layout
    and type, a constant: no gradient flows through it. NaN and infinities behind a closed gate are 0. Raises
    ValueError or TypeError for other shapes, types or mixed devices.
    """
    check_tensors(a=a, gate=gate)
    _check_images(a, "a", b, "b")
    shape = (a.shape[0], *a.shape[2:], (a.shape[1] + 7) // 8)
    if gate.shape != shape or gate.dtype != torch.uint8:
        raise ValueError(f"gate must be {shape} torch.uint8, not {tuple(gate.shape)} {gate.dtype}")
    check_device(a, gate)
    return GATED_SUM(a, b, gate)


def _check_images(x: torch.Tensor, name: str, other: torch.Tensor | None, its_name: str) -> None:
    if x.dim() < 2:
        raise ValueError(f"{name} must be (B, C, ...), not {tuple(x.shape)}")
    if x.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {x.dtype}")
    if other is None:
        return
    check_tensors(**{its_name: other})
    if other.shape != x.shape:
        raise ValueError(f"{its_name} is {tuple(other.shape)}, but {name} is {tuple(x.shape)}")
    if other.dtype != x.dtype:
        raise TypeError(f"{its_name} is {other.dtype}, but {name} is {x.dtype}")
    check_device(x, other)
