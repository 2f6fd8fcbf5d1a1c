"""A convolution and its input's gradient with what follows them in the same pass, for frozen weights.

Forward: relu(conv(x) + bias + skip) and its gate; backward: (gradient of x + other) where a gate is open, which is
the gradient in front of the ReLU that made x. Zero padding, one stride, no groups. Products are summed in float32
(float64 for float64 tensors), the result is rounded once. See bias_add_relu.py for gates.
"""

from __future__ import annotations

from typing import Any

import torch

from mwpb_kernels.conv_reference import (
    conv_fit,
    conv_input_grad_fake,
    conv_input_grad_reference,
    conv_relu_fake,
    conv_relu_reference,
    conv_samples,
    grad_fit,
    grad_samples,
    size_after,
)
from mwpb_kernels.implicit import BLOCK_K, _conv_kernel, block_m, last, launch
from mwpb_kernels.op import LOGIT_DTYPES, Compile, Op, check_device, check_tensors, compute_dtype


# launchers ---------------------------------------------------------------------------------------------------
def conv_relu_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, skip: torch.Tensor | None, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    out, gate = conv_relu_fake(x, weight, bias, skip, stride, padding)
    if out.numel():
        rows = out.permute(0, 2, 3, 1)
        launch(
            rows,
            last(x),
            weight,
            backward=False,
            bias_ptr=bias,
            bias_stride=bias.stride(0),
            other_ptr=rows if skip is None else last(skip),
            gate_ptr=gate,
            offset=padding,
            STRIDE=stride,
            APART=1,
            OTHER=skip is not None,
            GATED=True,
        )
    return out, gate


def conv_input_grad_triton(
    grad: torch.Tensor,
    weight: torch.Tensor,
    other: torch.Tensor | None,
    gate: torch.Tensor | None,
    stride: int,
    padding: int,
    height: int,
    width: int,
) -> torch.Tensor:
    out = conv_input_grad_fake(grad, weight, other, gate, stride, padding, height, width)
    if out.numel():
        rows = out.permute(0, 2, 3, 1)
        launch(
            rows,
            last(grad),
            weight,
            backward=True,
            bias_ptr=rows,
            bias_stride=0,
            other_ptr=rows if other is None else last(other),
            gate_ptr=rows if gate is None else gate.contiguous(),
            offset=padding,
            STRIDE=1,
            APART=stride,
            OTHER=other is not None,
            GATED=gate is not None,
        )
    return out


# registration ------------------------------------------------------------------------------------------------
def conv_bytes(*args: Any) -> int:
    return sum(t.nbytes for t in args if isinstance(t, torch.Tensor)) + args[0].nbytes


def _entries(backward: bool) -> tuple[Compile, ...]:
    integers = ("positions", "height", "width", "rows", "columns", "n_size", "k_size", "groups", "weight_n")
    sizes = dict.fromkeys((*integers, "weight_k", "weight_tap", "bias_stride", "offset"), "i32")
    return tuple(
        Compile(
            kernel=_conv_kernel,
            signature=dict.fromkeys(("out_ptr", "x_ptr", "weight_ptr", "other_ptr"), f"*{t}")
            | {"bias_ptr": "*fp32", "gate_ptr": "*u8"}
            | sizes,
            constants={
                "STRIDE": 1 if backward else stride,
                "APART": stride if backward else 1,
                "BACKWARD": backward,
                "OTHER": other,
                "GATED": True,
                "KERNEL": kernel,
                "PRECISION": "ieee" if t == "fp32" else "tf32",
                "WIDEN": False,
                "BLOCK_M": block_m(stride if backward else 1),
                "BLOCK_N": wide,
                "BLOCK_K": BLOCK_K,
            },
            num_warps=8,
            max_registers=255,
        )
        for t, kernel, stride, other, wide in (("bf16", 3, 1, True, 64), ("fp16", 1, 2, False, 64))
    )


CONV_RELU = Op(
    schema="conv_relu(Tensor x, Tensor weight, Tensor bias, Tensor? skip, int stride, int padding) "
    "-> (Tensor, Tensor)",
    reference=conv_relu_reference,
    fake=conv_relu_fake,
    triton=conv_relu_triton,
    samples=conv_samples,
    bytes_moved=conv_bytes,
    compiles=_entries(False),
    native=False,
    fit=conv_fit,
)
CONV_INPUT_GRAD = Op(
    schema="conv_input_grad(Tensor grad, Tensor weight, Tensor? other, Tensor? gate, int stride, int padding, "
    "int height, int width) -> Tensor",
    reference=conv_input_grad_reference,
    fake=conv_input_grad_fake,
    triton=conv_input_grad_triton,
    samples=grad_samples,
    bytes_moved=conv_bytes,
    compiles=_entries(True),
    native=False,
    fit=grad_fit,
)


# public functions --------------------------------------------------------------------------------------------
def conv_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    skip: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """relu(conv2d(x, weight) + bias + skip) and its gate, both constants: no gradient flows through them.

    x: (B, I, H, W) float32, bfloat16, float16 or float64, any strides. weight: (O, I, k, k) of x's type. bias:
    (O,) float32 (float64 beside float64 x). skip: like the result, or None. The result is a new channels-last
    tensor, the gate is as `bias_add_relu_` gives it. Made for CUDA; the CPU runs the reference. Raises ValueError
    or TypeError for other shapes, types or mixed devices.
    """
    _check("x", x, weight, stride, padding)
    check_tensors(bias=bias)
    if bias.shape != weight.shape[:1] or bias.dtype != compute_dtype(x.dtype):
        raise ValueError(
            f"bias must be ({len(weight)},) {compute_dtype(x.dtype)}, not {tuple(bias.shape)} {bias.dtype}"
        )
    sizes = [size_after(n, weight.shape[2], stride, padding) for n in x.shape[2:]]
    _check_like(x, (len(x), len(weight), *sizes), skip=skip)
    check_device(x, bias)
    return CONV_RELU(x, weight, bias, skip, stride, padding)


def conv_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    other: torch.Tensor | None,
    gate: torch.Tensor | None,
    stride: int,
    padding: int,
    height: int,
    width: int,
) -> torch.Tensor:
    """The gradient of conv2d's input, plus `other`, where the gate is open, else 0; a constant.

    grad: (B, O, h, w), at the convolution's result, as `conv_relu` takes x. weight: (O, I, k, k). other: like the
    result, or None. gate: of the input, (B, height, width, ceil(I / 8)) uint8, or None where all is open. Returns
    a new channels-last (B, I, height, width) tensor. Raises ValueError or TypeError for other shapes, types or
    mixed devices.
    """
    _check("grad", grad, weight, stride, padding)
    sizes = tuple(size_after(n, weight.shape[2], stride, padding) for n in (height, width))
    if grad.shape != (len(grad), len(weight), *sizes):
        raise ValueError(f"grad must be (B, {len(weight)}, {sizes[0]}, {sizes[1]}), not {tuple(grad.shape)}")
    _check_like(grad, (len(grad), weight.shape[1], height, width), other=other)
    if gate is not None:
        check_tensors(gate=gate)
        shape = (len(grad), height, width, (weight.shape[1] + 7) // 8)
        if gate.shape != shape or gate.dtype != torch.uint8:
            raise ValueError(f"gate must be {shape} torch.uint8, not {tuple(gate.shape)} {gate.dtype}")
        check_device(grad, gate)
    return CONV_INPUT_GRAD(grad, weight, other, gate, stride, padding, height, width)


def _check(name: str, x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> None:
    check_tensors(**{name: x}, weight=weight)
    if x.dim() != 4:
        raise ValueError(f"{name} must be (B, channels, height, width), not {tuple(x.shape)}")
    if x.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {x.dtype}")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.dtype != x.dtype:
        raise ValueError(f"weight must be (O, I, k, k) {x.dtype}, not {tuple(weight.shape)} {weight.dtype}")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride must be at least 1 and padding at least 0, not {stride} and {padding}")
    check_device(x, weight)


def _check_like(x: torch.Tensor, shape: tuple[int, ...], **named: torch.Tensor | None) -> None:
    for name, other in named.items():
        if other is None:
            continue
        check_tensors(**{name: other})
        if other.shape != shape or other.dtype != x.dtype:
            raise ValueError(f"{name} must be {shape} {x.dtype}, not {tuple(other.shape)} {other.dtype}")
        check_device(x, other)
