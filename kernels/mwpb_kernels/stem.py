"""The convolution that reads the image, on tensor cores without rounding the image, and its step of an attack.

Both take float32 as a sum of two numbers of a half type, high + low (Henry, Tang and Heinecke, "Leveraging the
bfloat16 artificial intelligence datatype for higher-precision computations", ARITH 2019), so that products of
bfloat16 parts, summed in float32, are within 2^-15 of their own size of the exact ones. Backward, the gradient of
the image is not stored: its sign moves the adversarial image at once, in its ball and the pixel range (linf.py).
"""

from __future__ import annotations

from typing import Any

import torch

from mwpb_kernels.conv_reference import size_after
from mwpb_kernels.op import IMAGE_DTYPES, Compile, Op, check_device, check_tensors, whole, writes_in_place
from mwpb_kernels.stem_kernels import (
    BLOCK_M,
    DEEPEST,
    TAPS,
    _stem_conv_kernel,
    _stem_step_kernel,
    stem_conv_triton,
    stem_step_triton,
)
from mwpb_kernels.stem_reference import (
    stem_conv_fake,
    stem_conv_reference,
    stem_fit,
    stem_samples,
    stem_step_fit,
    stem_step_reference,
    stem_step_samples,
)
from mwpb_kernels.strided import check_images, check_step, per_sample, pixel_range


# registration ------------------------------------------------------------------------------------------------
def _sizes(*names: str) -> dict[str, str]:
    shared = ("positions", "height", "width", "rows", "columns", "x_b", "x_c", "x_y", "x_x", "offset")
    return dict.fromkeys((*shared, *names), "i32")


def _conv_bytes(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> int:
    out, gate = stem_conv_fake(x.to("meta"), weight.to("meta"), *others)
    return x.nbytes + weight.nbytes + out.nbytes + gate.nbytes


def _step_bytes(x_adv: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, *others: Any) -> int:
    """x_adv read and written, x, gradient and weights read."""
    return 3 * x_adv.nbytes + grad.nbytes + weight.nbytes


STEM_CONV = Op(
    schema="stem_conv(Tensor x, Tensor weight, Tensor? bias, bool relu, int stride, int padding, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    reference=stem_conv_reference,
    fake=stem_conv_fake,
    triton=stem_conv_triton,
    samples=stem_samples,
    bytes_moved=_conv_bytes,
    compiles=tuple(
        Compile(
            kernel=_stem_conv_kernel,
            signature={
                **{"out_ptr": f"*{t}", "gate_ptr": "*u8" if relu else f"*{t}", "x_ptr": "*fp32"},
                **{"weight_ptr": "*fp32", "bias_ptr": "*fp32"},
                **_sizes("n_size", "groups", "bias_stride"),
            },
            constants={
                **{"STRIDE": stride, "CHANNELS": 3, "KERNEL": kernel, "BIAS": relu, "RELU": relu, "WIDEN": False},
                **{"BLOCK_M": BLOCK_M, "BLOCK_N": wide, "BLOCK_K": TAPS},
            },
            num_warps=8,
            max_registers=200,
        )
        for t, relu, kernel, stride, wide in (
            ("bf16", True, 3, 1, 64),
            ("fp16", True, 7, 2, 64),
            ("bf16", False, 3, 1, 16),
        )
    ),
    native=False,
    fit=stem_fit,
)
STEM_STEP = Op(
    schema="stem_step_(Tensor(a!) x_adv, Tensor grad, Tensor weight, Tensor x, Tensor radius, Tensor step_size, "
    "int stride, int padding, float lo, float hi) -> ()",
    reference=stem_step_reference,
    fake=writes_in_place,
    triton=stem_step_triton,
    mutates=(0,),
    samples=stem_step_samples,
    bytes_moved=_step_bytes,
    compiles=tuple(
        Compile(
            kernel=_stem_step_kernel,
            signature={
                **dict.fromkeys(("adv_ptr", "x_ptr", "weight_ptr", "radius_ptr", "step_ptr"), "*fp32"),
                **{"grad_ptr": f"*{t}", "lo": "fp32", "hi": "fp32"},
                **_sizes("k_size", "adv_b", "adv_c", "adv_y", "adv_x", "radius_stride", "step_stride"),
            },
            constants={
                **{"APART": stride, "CHANNELS": 3, "KERNEL": kernel, "SPLIT": t != "fp32", "WIDEN": False},
                **{"BLOCK_M": BLOCK_M, "BLOCK_C": 8, "BLOCK_K": DEEPEST},
            },
            num_warps=8,
            max_registers=200,
        )
        for t, kernel, stride in (("bf16", 3, 1), ("fp16", 7, 2), ("fp32", 3, 1))
    ),
    native=False,
    fit=stem_step_fit,
)


# public functions --------------------------------------------------------------------------------------------
def stem_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    relu: bool = True,
    stride: int = 1,
    padding: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """conv2d(x, weight) + bias in `dtype`, its ReLU if asked for, and the gate of that; constants.

    x: (B, C, H, W) float32 or float64, any strides. weight: (O, C, k, k) of x's type. bias: (O,) of x's type, or
    None. dtype: bfloat16 or float16. The result is a new channels-last tensor, the gate as `bias_add_relu_` gives
    it, without bytes where there is no ReLU. Of float32 the value before the last rounding is within
    2^-15 * conv2d(|x|, |weight|) of the exact one; what is not finite in x or weight gives NaN or what is not
    finite. Made for CUDA; the CPU runs the reference. Raises ValueError or TypeError for other shapes, types or
    mixed devices.
    """
    check_images(x)
    check_tensors(weight=weight)
    stride, padding = _check_weight(x, weight, stride, padding)
    if bias is not None:
        check_tensors(bias=bias)
        if bias.shape != weight.shape[:1] or bias.dtype != x.dtype:
            raise ValueError(f"bias must be ({len(weight)},) {x.dtype}, not {tuple(bias.shape)} {bias.dtype}")
        check_device(x, bias)
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"dtype must be bfloat16 or float16, not {dtype}")
    return STEM_CONV(x, weight, bias, relu, stride, padding, dtype)


def stem_step_(
    x_adv: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    radius: float | torch.Tensor,
    step_size: float | torch.Tensor,
    stride: int = 1,
    padding: int = 0,
    lo: float = 0.0,
    hi: float = 1.0,
) -> torch.Tensor:
    """`linf_step_` in place along the sign of conv2d's input gradient, which is not stored.

    x_adv, x, radius, step_size, lo, hi: as `linf_step_` takes them, images (B, C, H, W). grad: (B, O, h, w) at the
    convolution's result: float32, bfloat16, float16 or float64, any strides; it shares no memory with x_adv.
    weight: (O, C, k, k) of x's type, which beside a gradient of a half type counts to 2^-17 of itself. Made for
    CUDA; the CPU runs the reference. Returns x_adv. Raises ValueError or TypeError as `linf_step_` does, and for
    other shapes or types of grad and weight.
    """
    check_tensors(grad=grad, weight=weight)
    check_step(x_adv, x, x)
    stride, padding = _check_weight(x, weight, stride, padding)
    sizes = (size_after(n, weight.shape[2], stride, padding) for n in x.shape[2:])
    expected = (len(x), len(weight), *sizes)
    if grad.shape != expected:
        raise ValueError(f"grad must be {expected}, not {tuple(grad.shape)}")
    if not grad.dtype.is_floating_point or grad.dtype.itemsize < 2:
        raise TypeError(f"grad must be float32, bfloat16, float16 or float64, not {grad.dtype}")
    check_device(x, grad)
    of_samples = per_sample(radius, x, "radius"), per_sample(step_size, x, "step_size")
    STEM_STEP(x_adv, grad, weight, x, *of_samples, stride, padding, *pixel_range(lo, hi))
    return x_adv


def _check_weight(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> tuple[int, int]:
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), not {tuple(x.shape)}")
    if x.dtype not in IMAGE_DTYPES:
        raise TypeError(f"x must be float32 or float64, not {x.dtype}: pass x.float()")
    channels = weight.shape[1:2]
    if (
        weight.dim() != 4
        or channels != x.shape[1:2]
        or weight.shape[2] != weight.shape[3]
        or weight.dtype != x.dtype
    ):
        shape = f"(O, {x.shape[1]}, k, k) {x.dtype}"
        raise ValueError(f"weight must be {shape}, not {tuple(weight.shape)} {weight.dtype}")
    stride, padding = whole(stride, "stride"), whole(padding, "padding")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride must be at least 1 and padding at least 0, not {stride} and {padding}")
    check_device(x, weight)
    return stride, padding
