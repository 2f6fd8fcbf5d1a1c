"""What the ops on batches of images share: their checks, and Triton loops over samples of any layout.

A kernel sees a sample as up to three dimensions, merged from those of the tensors wherever all operands allow
it; operands of equal dense layout become one flat run. More than three are rare and go through copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import (
    LOGIT_DTYPES,
    check_device,
    check_tensors,
    compute_dtype,
    number,
    tl,
    triton,
)

MAX_DIMS = 3
# One program holds at most so many elements, 8 a thread: with more the strided kernels would spill registers.
MAX_TILE = 4096


# checks ------------------------------------------------------------------------------------------------------
def check_images(x: Tensor) -> None:
    """Refuse what is no batch of images."""
    check_tensors(x=x)
    if x.dim() < 1:
        raise ValueError("x must be (B, ...), not a scalar")
    if x.dtype not in LOGIT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, not {x.dtype}")


def widened(x: Tensor) -> Tensor:
    """Images of a half type as float32, without loss; others as they are.

    What an attack moves is never of a half type: near 1 its values are 1/256 or 1/2048 apart, so noise and
    small steps would be rounded away and a ball's surface be crossed, in silence.
    """
    return x.to(compute_dtype(x.dtype))


def pixel_range(lo: float, hi: float) -> tuple[float, float]:
    """The two ends as floats; an empty range is refused."""
    lo, hi = number(lo, "lo"), number(hi, "hi")
    if not lo <= hi:
        raise ValueError(f"lo must not exceed hi, got lo={lo} and hi={hi}")
    return lo, hi


def check_step(x_adv: Tensor, grad: Tensor, x: Tensor) -> None:
    """Refuse operands of an in-place attack step that do not fit together or must not be written."""
    check_images(x)
    check_tensors(x_adv=x_adv, grad=grad)
    for name, other in (("x_adv", x_adv), ("grad", grad)):
        if other.shape != x.shape:
            raise ValueError(f"{name} is {tuple(other.shape)}, but x is {tuple(x.shape)}")
    if x_adv.dtype != compute_dtype(x.dtype):
        cure = (
            "" if x_adv.dtype.itemsize > 2 else f": pass {compute_dtype(x.dtype)}, a half type rounds steps away"
        )
        raise TypeError(f"x_adv is {x_adv.dtype}, but x is {x.dtype}{cure}")
    if not grad.dtype.is_floating_point or grad.dtype.itemsize < 2:
        raise TypeError(f"grad must be float32, bfloat16, float16 or float64, not {grad.dtype}")
    check_device(x_adv, grad, x)
    if torch.is_grad_enabled() and x_adv.requires_grad:
        raise ValueError("x_adv requires grad and is written in place: pass x_adv.detach()")
    shared = any(size > 1 and stride == 0 for size, stride in zip(x_adv.shape, x_adv.stride(), strict=True))
    if shared and x_adv.numel() > 0:
        raise ValueError("x_adv is expanded, so its elements share memory: pass x_adv.contiguous()")


def per_sample(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """(B,) tensor in x's type from such a tensor, a 0-d one or one number, without synchronisation."""
    if isinstance(value, Tensor) and (value.dim() or value.device == x.device):
        if value.dim() and value.shape != x.shape[:1]:
            raise ValueError(f"{name} must be a number or ({x.shape[0]},), not {tuple(value.shape)}")
        is_number = value.dim() == 0 and value.dtype != torch.bool and not value.is_complex()
        if not (value.dtype.is_floating_point or is_number):
            raise TypeError(f"{name} must be floating point, not {value.dtype}")
        check_device(x, value)
        return value.to(x.dtype).expand(x.shape[0])
    value = number(value, name)
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return torch.full((1,), value, dtype=x.dtype, device=x.device).expand(x.shape[0])


def column(values: Tensor, x: Tensor) -> Tensor:
    """(B,) values as (B, 1, ..., 1), to broadcast over x's samples."""
    return values.view(-1, *(1,) * (x.dim() - 1))


def rows(t: Tensor) -> Tensor:
    """(B, ...) as (B, n)."""
    return t.flatten(1) if t.dim() > 1 else t[:, None]


def nonzero(t: Tensor) -> Tensor:
    """1 in the place of 0, as a divisor of what is 0 too."""
    return torch.where(t == 0, 1, t)


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def tile_of(n, blocks, BLOCK: tl.constexpr):
    """This program's sample, its element numbers in the sample, and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    element = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, element, element < n


@triton.jit
def offset_of(element, size_1, size_2, stride_0, stride_1, stride_2, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """int64 offsets of elements that are numbered through three dimensions; WIDE: numbers beyond 31 bits."""
    if FLAT:
        offset = element
    else:
        e = element if WIDE else element.to(tl.int32)
        rest = e // size_2
        offset = (
            (rest // size_1).to(tl.int64) * stride_0
            + (rest % size_1).to(tl.int64) * stride_1
            + (e % size_2).to(tl.int64) * stride_2
        )
    return offset


@triton.jit
def clamp_between(v, low, high):
    """As torch.clamp: high where low > high, NaN where anything is NaN."""
    v = tl.where(v < low, low, v)
    v = tl.where(v > high, high, v)
    return tl.where((low != low) | (high != high), float("nan"), v)


def merged_dims(operands: Sequence[Tensor], logical: bool = False) -> tuple[list[int], list[list[int]]]:
    """Sizes and each operand's strides of a sample's dimensions, outermost first, merged where all allow it.

    In the order of the first operand's memory, or in the logical order of the dimensions.
    """
    first = operands[0]
    dims = [d for d in range(1, first.dim()) if first.shape[d] != 1]
    if not logical:
        dims.sort(key=first.stride, reverse=True)
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in dims:
        size = first.shape[d]
        if sizes and all(s[-1] == t.stride(d) * size for s, t in zip(strides, operands, strict=True)):
            sizes[-1] *= size
            for s, t in zip(strides, operands, strict=True):
                s[-1] = t.stride(d)
        else:
            sizes.append(size)
            for s, t in zip(strides, operands, strict=True):
                s.append(t.stride(d))
    return sizes, strides


def fits(*operands: Tensor, logical: bool = False) -> bool:
    """Whether a kernel can walk these operands as they lie."""
    return len(merged_dims(operands, logical)[0]) <= MAX_DIMS


def loop_arguments(block: int, logical: bool = False, **operands: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, and the arguments of the loop over samples; an operand `a` gives a_ptr, a_b, a_0, a_1 and a_2."""
    tensors = list(operands.values())
    sizes, strides = merged_dims(tensors, logical)
    flat = len(sizes) == 0 or (len(sizes) == 1 and all(s == [1] for s in strides))
    missing = MAX_DIMS - len(sizes)
    sizes = [1] * missing + sizes
    n = sizes[0] * sizes[1] * sizes[2]
    blocks = triton.cdiv(n, block)
    arguments: dict[str, Any] = dict(
        n=n, blocks=blocks, size_1=sizes[1], size_2=sizes[2], FLAT=flat, WIDE=n + block >= 2**31, BLOCK=block
    )
    for (name, t), own in zip(operands.items(), strides, strict=True):
        own = [0] * missing + own
        arguments.update({f"{name}_ptr": t, f"{name}_b": t.stride(0), f"{name}_0": own[0]})
        arguments.update({f"{name}_1": own[1], f"{name}_2": own[2]})
    return (t.shape[0] * blocks,), arguments


def tile_shape(x: Tensor) -> tuple[int, int, bool]:
    """Elements and warps of a tile, and whether it holds a whole sample."""
    n = x.shape[1:].numel()
    block = max(16, min(MAX_TILE, triton.next_power_of_2(n)))
    return block, max(1, block // 256), n <= block


def loop_types(**operands: str) -> dict[str, str]:
    """Ahead-of-time types of `loop_arguments`: element type by operand."""
    types = dict.fromkeys(("n", "blocks", "size_1", "size_2"), "i32")
    for name, t in operands.items():
        types.update({f"{name}_ptr": f"*{t}", **{f"{name}_{d}": "i32" for d in ("b", 0, 1, 2)}})
    return types
