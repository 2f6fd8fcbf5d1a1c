"""What a machine can do at most, and how much arithmetic a model is: what benchmarks hold times against."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import SkippedError, seconds
from torch import Tensor, nn

from mwpb_fast.engine.processor import cpu_has_bf16

LIMIT = 2.0  # seconds that one rate may take to measure, about
SMALLEST = 256  # rows and columns of the first product; each further one has twice as many
READINGS = 3


def emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the processor computes with that type by other types' instructions. A product then takes some
    hundred times as long, so what needs one is named as skipped and not timed."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_bf16()


def refuse_emulated(dtype: torch.dtype, device: torch.device) -> None:
    """Raises SkippedError for a type that the processor emulates."""
    if emulated(dtype, device):
        raise SkippedError(f"this CPU emulates {str(dtype).removeprefix('torch.')}")


def arithmetic(dtype: torch.dtype, device: torch.device) -> str:
    """What convolutions of that type are computed in. In float32 on CUDA that is TF32 by PyTorch's default."""
    if dtype == torch.float32 and device.type == "cuda":
        backends: Any = torch.backends
        rounded = backends.cudnn.conv.fp32_precision == "tf32" and torch.cuda.get_device_capability(device) >= (
            8,
            0,
        )
        return "TF32" if rounded else "float32"
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def products_in(kind: str) -> Iterator[None]:
    """Inside the block float32 matrix products on CUDA are TF32 where `kind` says so, as convolutions are.

    It is asked for by PyTorch's older switch, which sets the newer one as well: PyTorch, its cuBLAS calls among
    it, raises where it reads one that does not agree with the other.
    """
    place: Any = torch.backends.cuda.matmul
    if kind != "TF32":
        yield
        return
    older, newer = place.allow_tf32, place.fp32_precision
    place.allow_tf32 = True
    try:
        yield
    finally:
        place.allow_tf32, place.fp32_precision = older, newer


def matrix_rate(
    dtype: torch.dtype,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    limit: float = LIMIT,
) -> float:
    """FLOP/s of a large square product of random matrices, the best of three; in what convolutions of that type
    are computed in. As large as `limit` seconds allow, by the time of a smaller one. Raises SkippedError for a
    type that the processor emulates."""
    refuse_emulated(dtype, device)
    n, most = SMALLEST, 8192 if device.type == "cuda" else 2048
    with products_in(arithmetic(dtype, device)):
        while True:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            torch.mm(a, b)
            taken = min(seconds(partial(torch.mm, a, b), device, clock) for _ in range(READINGS))
            # one with twice as many rows and columns is eight times the work, and is made once more to warm up
            if n == most or 8 * taken * (READINGS + 1) > limit:
                return 2 * n**3 / taken
            n *= 2


def matrix_rates(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """By `arithmetic`, for those of the two number types that are compared which the processor has."""
    kinds = [dtype for dtype in (torch.bfloat16, torch.float32) if not emulated(dtype, device)]
    return {arithmetic(dtype, device): matrix_rate(dtype, device, clock) for dtype in kinds}


def copy_bandwidth(device: torch.device, volume: int = 0) -> float:
    """Bytes a second of a large copy, read and written ones together, the best of three."""
    n = (volume or (2**32 if device.type == "cuda" else 2**28)) // 2
    source = torch.randint(256, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    return 2 * n / min(seconds(lambda: target.copy_(source), device) for _ in range(3))


def multiply_adds(model: nn.Module, size: int) -> int:
    """Of one image's forward pass, in convolutions and linear layers."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += weight.numel() * (out.shape[2] * out.shape[3] if out.dim() == 4 else 1)

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_hook(count) for m in layers]
    before = [m.training for m in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in zip(model.modules(), before, strict=True):
            module.training = mode
    return total
