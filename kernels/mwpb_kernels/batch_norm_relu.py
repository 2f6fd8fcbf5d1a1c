"""relu(batch norm(x) + skip) with the batch's own statistics, as in training, and its backward: two passes each.

Statistics and sums are float32 (float64 for float64 tensors), and the result is rounded once, where a batch norm,
an addition and a ReLU one after the other round three times. What the backward must know of the ReLU is one bit
an element, as in bias_add_relu.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.batch_norm_backward import (
    SUMS_TILE,
    _batch_norm_relu_backward_kernel,
    _gradient_sums_kernel,
    _gradient_totals_kernel,
    batch_norm_relu_backward_triton,
)
from mwpb_kernels.batch_norm_forward import (
    FEW,
    PARTS,
    TILE,
    _batch_moments_kernel,
    _batch_norm_relu_kernel,
    _batch_statistics_kernel,
    batch_norm_relu_triton,
)
from mwpb_kernels.batch_norm_reference import (
    backward_fake,
    backward_samples,
    batch_norm_relu_backward_reference,
    batch_norm_relu_reference,
    norm_fake,
    norm_samples,
)
from mwpb_kernels.bias_add_relu import cycled
from mwpb_kernels.op import LOGIT_DTYPES, Compile, Op, check_device, check_tensors, compute_dtype, number


# registration ------------------------------------------------------------------------------------------------
def _entries(
    kernel: Any, numbers: str, *vectors: str, images: str, both: bool = False, tile: int = TILE
) -> tuple[Compile, ...]:
    """Of a kernel over tiles; numbers: its integers besides rows and channels."""
    integers = dict.fromkeys(("rows", "channels", *numbers.split()), "i32")
    fixed = dict.fromkeys(vectors, "*fp32") | ({"gate_ptr": "*u8"} if "groups" in numbers else {}) | integers
    return tuple(
        Compile(
            kernel=kernel,
            signature=dict.fromkeys(images.split(), f"*{t}") | fixed,
            constants={"ROWS": tile // wide, "COLUMNS": wide} | ({"SKIP": skip} if both else {}),
        )
        for t, wide, skip in (("bf16", 64, True), ("bf16", 512, False), ("fp16", 8, True), ("fp32", 64, False))
    )


def _totals(kernel: Any, vectors: str, numbers: str, **more: str) -> Compile:
    """Of a kernel over the programs' sums."""
    signature = dict.fromkeys(vectors.split(), "*fp32") | dict.fromkeys(numbers.split(), "i32") | more
    return Compile(kernel=kernel, signature=signature, constants={"PARTS": PARTS, "COLUMNS": FEW})


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, *_ = inputs
    _, mean, invstd, gate, *_ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(x, weight, mean, invstd, gate)


def _backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    of_x, of_weight, of_bias, of_skip = BATCH_NORM_RELU_BACKWARD(grad, *ctx.saved_tensors, ctx.needs_input_grad[5])
    return of_x, of_weight, of_bias, None, None, of_skip if ctx.needs_input_grad[5] else None, None, None


BATCH_NORM_RELU_BACKWARD = Op(
    schema="batch_norm_relu_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor invstd, "
    "Tensor gate, bool skipped) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=batch_norm_relu_backward_reference,
    fake=backward_fake,
    triton=batch_norm_relu_backward_triton,
    samples=backward_samples,
    bytes_moved=lambda grad, x, weight, mean, invstd, gate, skipped: (
        x.nbytes * (6 if skipped else 5) + 2 * gate.nbytes + 5 * weight.nbytes
    ),
    compiles=(
        *_entries(
            _gradient_sums_kernel,
            "groups steps mean_stride",
            "of_bias_ptr",
            "of_weight_ptr",
            "mean_ptr",
            images="grad_ptr x_ptr",
            tile=SUMS_TILE,
        ),
        _totals(
            _gradient_totals_kernel,
            "of_bias_ptr of_weight_ptr bias_parts_ptr weight_parts_ptr invstd_ptr",
            "channels parts invstd_stride",
        ),
        *_entries(
            _batch_norm_relu_backward_kernel,
            "groups weight_stride mean_stride invstd_stride",
            *("weight_ptr", "mean_ptr", "invstd_ptr", "of_weight_ptr", "of_bias_ptr"),
            images="of_x_ptr of_skip_ptr grad_ptr x_ptr",
            both=True,
        ),
    ),
    fit=lambda grad, x, weight, mean, invstd, gate, skipped: (
        *(grad, x, weight, mean, invstd),
        cycled(gate, (x.shape[0], *x.shape[2:], (x.shape[1] + 7) // 8)),
        skipped,
    ),
)
BATCH_NORM_RELU = Op(
    schema="batch_norm_relu(Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, "
    "Tensor? skip, float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=batch_norm_relu_reference,
    fake=norm_fake,
    triton=batch_norm_relu_triton,
    setup_context=_save_for_backward,
    backward=_backward,
    differentiable=(0, 1, 2, 5),
    samples=norm_samples,
    bytes_moved=lambda x, weight, bias, mean, var, skip, momentum, eps: (
        x.nbytes * (3 if skip is None else 4) + x.numel() // 8 + 8 * weight.nbytes
    ),
    compiles=(
        *_entries(_batch_moments_kernel, "steps", "means_ptr", "squares_ptr", images="x_ptr"),
        _totals(
            _batch_statistics_kernel,
            "mean_ptr invstd_ptr new_mean_ptr new_var_ptr running_mean_ptr running_var_ptr means_ptr squares_ptr",
            "rows channels parts a_part mean_stride var_stride",
            momentum="fp32",
            eps="fp32",
        ),
        *_entries(
            _batch_norm_relu_kernel,
            "groups weight_stride bias_stride",
            *("mean_ptr", "invstd_ptr", "weight_ptr", "bias_ptr"),
            images="out_ptr x_ptr skip_ptr",
            both=True,
        ),
    ),
)


# public functions --------------------------------------------------------------------------------------------
def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    skip: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(x) + skip) with the statistics of the batch; the running ones follow them in place.

    x: (B, C, ...) float32, bfloat16, float16 or float64, any strides, at least two values a channel; fastest on
    CUDA where its channels lie side by side (channels-last). weight, bias, running_mean, running_var: (C,) float32
    (float64 beside float64 x), any stride. skip: like x in shape and type, any strides, or None. momentum: the
    share of the new in the running statistics, as torch.nn.BatchNorm2d has it, whose variance is divided by n - 1.
    eps: is added to the batch's variance, which is divided by n.

    Returns a new tensor with x's layout and type, rounded once. Differentiable once, in x, weight, bias and skip;
    the gradient is 0 where the result is. A channel that holds a NaN or an infinity is NaN. Raises ValueError or
    TypeError for other shapes, types or mixed devices. Source: Ioffe and Szegedy, "Batch Normalization", ICML
    2015, algorithm 1.
    """
    out, _, _, _, new_mean, new_var = norms(x, weight, bias, running_mean, running_var, skip, momentum, eps)
    made_there = not torch.compiler.is_compiling() and running_mean.is_inference()
    with torch.inference_mode() if made_there else torch.no_grad():  # where alone PyTorch lets them be written
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return out


def norms(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    skip: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op's results for checked arguments: out, mean, 1 / sqrt(var + eps), gate, new running mean and variance;
    what is running is left to the caller, who may write it for many layers at once."""
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_tensors(x=x, **vectors)
    if x.dim() < 2:
        raise ValueError(f"x must be (B, C, ...), not {tuple(x.shape)}")
    if x.dtype not in LOGIT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    for name, values in vectors.items():
        if values.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be ({x.shape[1]},), not {tuple(values.shape)}")
        if values.dtype != compute_dtype(x.dtype):
            raise TypeError(f"{name} must be {compute_dtype(x.dtype)} beside {x.dtype} x, not {values.dtype}")
    if x.shape[1] and x.numel() < 2 * x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} has {x.numel() // x.shape[1]} values a channel, whose variance needs two"
        )
    check_device(x, *vectors.values())
    if skip is not None:
        check_tensors(skip=skip)
        if skip.shape != x.shape or skip.dtype != x.dtype:
            raise ValueError(f"skip is {tuple(skip.shape)} {skip.dtype}, but x is {tuple(x.shape)} {x.dtype}")
        check_device(x, skip)
    momentum, eps = number(momentum, "momentum"), number(eps, "eps")
    return BATCH_NORM_RELU(x, weight, bias, running_mean, running_var, skip, momentum, eps)
