"""The l_inf attack step: sign step, projection to each sample's own ball and to the pixel range, in one pass.

x_adv <- clamp(clamp(x_adv + step_size * sign(grad), x - radius, x + radius), lo, hi): PGD (Madry et al., 2018)
with the per-sample radius and step of the MWPB paper's Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import Compile, Op, tl, triton, writes_in_place
from mwpb_kernels.strided import (
    check_step,
    clamp_between,
    column,
    fits,
    loop_arguments,
    loop_types,
    offset_of,
    per_sample,
    pixel_range,
    tile_of,
    widened,
)


# reference ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def linf_step_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, radius: Tensor, step_size: Tensor, lo: float, hi: float
) -> None:
    radius, step_size = column(radius, x), column(step_size, x)
    moved = x_adv + step_size * torch.sign(grad).to(x.dtype)
    x_adv.copy_(torch.clamp(moved, x - radius, x + radius).clamp(lo, hi))


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def sign(g):
    """-1, 0 or 1; 0 for NaN."""
    return tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))


@triton.jit
def _linf_step_kernel(
    adv_ptr,  # (B, ...) in place
    grad_ptr,  # (B, ...)
    x_ptr,  # (B, ...)
    radius_ptr,  # (B,)
    step_ptr,  # (B,)
    n, blocks, size_1, size_2,
    adv_b, adv_0, adv_1, adv_2,
    grad_b, grad_0, grad_1, grad_2,
    x_b, x_0, x_1, x_2,
    radius_stride, step_stride, lo, hi,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, element, inside = tile_of(n, blocks, BLOCK)
    radius = tl.load(radius_ptr + sample * radius_stride)
    step = tl.load(step_ptr + sample * step_stride)
    adv_at = adv_ptr + sample * adv_b + offset_of(element, size_1, size_2, adv_0, adv_1, adv_2, FLAT, WIDE)
    grad_at = grad_ptr + sample * grad_b + offset_of(element, size_1, size_2, grad_0, grad_1, grad_2, FLAT, WIDE)
    x_at = x_ptr + sample * x_b + offset_of(element, size_1, size_2, x_0, x_1, x_2, FLAT, WIDE)
    adv = tl.load(adv_at, mask=inside)
    grad = tl.load(grad_at, mask=inside).to(tl.float32)
    x = tl.load(x_at, mask=inside)
    moved = adv + step * sign(grad)
    inner = clamp_between(moved, x - radius, x + radius)
    tl.store(adv_at, clamp_between(inner, lo, hi), mask=inside)


# launchers ---------------------------------------------------------------------------------------------------
def linf_step_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, radius: Tensor, step_size: Tensor, lo: float, hi: float
) -> None:
    if not x_adv.numel():
        return
    target = x_adv
    if not fits(x_adv, grad, x):
        target, grad, x = x_adv.contiguous(), grad.contiguous(), x.contiguous()
    grid, arguments = loop_arguments(1024, adv=target, grad=grad, x=x)
    _linf_step_kernel[grid](
        radius_ptr=radius,
        step_ptr=step_size,
        radius_stride=radius.stride(0),
        step_stride=step_size.stride(0),
        lo=lo,
        hi=hi,
        num_warps=8,  # A thread then holds four elements: one vector load of each operand.
        **arguments,
    )
    if target.data_ptr() != x_adv.data_ptr():
        x_adv.copy_(target)


# registration ------------------------------------------------------------------------------------------------
def step_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Operands of a step: empty, one element, odd sizes, CIFAR's shape, all gradient types, five dimensions."""
    generator = torch.Generator().manual_seed(0)
    for shape, grad_dtype, dtype in (
        ((0, 3, 4, 4), torch.float32, torch.float32),
        ((2, 0), torch.float32, torch.float32),
        ((1,), torch.float32, torch.float32),
        ((3, 1, 5, 7), torch.bfloat16, torch.float32),
        ((5, 33), torch.float16, torch.float32),
        ((2, 3, 5, 2, 3), torch.float32, torch.float32),
        ((3, 2, 3, 5), torch.float64, torch.float64),
        ((3, 2, 3, 5), torch.float32, torch.float64),
        ((128, 3, 32, 32), torch.float32, torch.float32),
        ((2, 3, 53, 67), torch.float32, torch.float32),
    ):
        x = torch.rand(shape, generator=generator, dtype=dtype)
        x_adv = (x + 0.05 * torch.randn(shape, generator=generator, dtype=dtype)).clamp(0, 1)
        grad = torch.randn(shape, generator=generator).to(grad_dtype)
        grad.view(-1)[::7] = 0
        radius = torch.linspace(0.01, 0.06, shape[0], dtype=dtype)
        if len(shape) == 4:  # the layout that training uses
            x_adv, grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (x_adv, grad, x))
        yield *(t.to(device) for t in (x_adv, grad, x, radius, radius / 4)), 0.0, 1.0


def step_bytes(x_adv: Tensor, grad: Tensor, x: Tensor, *others: Any) -> int:
    """x_adv read and written, x and grad read."""
    return x.numel() * (3 * x.element_size() + grad.element_size())


LINF_STEP = Op(
    schema=(
        "linf_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor radius, Tensor step_size, "
        "float lo, float hi) -> ()"
    ),
    reference=linf_step_reference,
    fake=writes_in_place,
    triton=linf_step_triton,
    mutates=(0,),
    samples=step_samples,
    bytes_moved=step_bytes,
    compiles=tuple(
        Compile(
            kernel=_linf_step_kernel,
            signature={
                **loop_types(adv="fp32", grad=grad, x="fp32"),
                **dict(radius_ptr="*fp32", step_ptr="*fp32", radius_stride="i32", step_stride="i32"),
                **dict(lo="fp32", hi="fp32"),
            },
            constants={"FLAT": flat, "WIDE": wide, "BLOCK": 1024},
            num_warps=8,
        )
        for grad, flat, wide in (
            ("fp32", True, False),
            ("bf16", True, False),
            ("fp16", False, False),
            ("fp32", False, True),
        )
    ),
)


# public function ---------------------------------------------------------------------------------------------
def linf_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    radius: float | Tensor,
    step_size: float | Tensor,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """One ascending l_inf step in place: clamp(clamp(x_adv + step_size * sign(grad), x ± radius), lo, hi).

    x_adv: (B, ...) float32 or float64, any strides without overlap; written and returned. x: the clean images,
    same shape and type, any strides; beside a float32 x_adv also bfloat16 or float16, which costs a pass
    (`x.float()`, made once, saves it). grad: same shape, float32, bfloat16, float16 or float64, any strides.
    radius, step_size: (B,) tensors, one value a sample (not negative; not checked, to avoid synchronisation), or
    numbers; in the images' units. lo, hi: the pixel range, which applies last. Neither grad nor x may share
    memory with x_adv, unless it is the same tensor.

    One rounding each in x_adv + step_size and x ± radius, so the result is bit-equal on every implementation
    and |x_adv - x| <= radius up to the rounding of x ± radius. sign(0) = 0, and 0 for a NaN gradient, as
    torch.sign. A NaN in x_adv, x, radius or step_size gives NaN. No gradient flows through the step.
    Raises ValueError or TypeError for other shapes, types, mixed devices, a negative number, lo > hi, and an
    x_adv that is expanded or that requires grad while grad mode is on. Source: MWPB, Algorithm 1.
    """
    check_step(x_adv, grad, x)
    x = widened(x)
    lo, hi = pixel_range(lo, hi)
    LINF_STEP(x_adv, grad, x, per_sample(radius, x, "radius"), per_sample(step_size, x, "step_size"), lo, hi)
    return x_adv
