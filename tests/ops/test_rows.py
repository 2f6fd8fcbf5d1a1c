"""Ops over rows of logits around the size of a block of rows: 4, 8 or 16 of them, by the processor's level."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
import torch
from cases import NAMES, OPS, compare, describe, outcome
from mwpb_kernels.op import Op, compute_dtype

ROW_OPS = [n for n in NAMES if any(a.name.startswith("logits") for a in OPS[n].dispatched._schema.arguments)]
BATCHES = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 67)
PROT_NONE = 0  # which the mmap module does not name
CLASSES = (3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 100)


def arguments(
    op: Op, batch: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 4.0
) -> tuple[Any, ...]:
    """Random tensors, a few labels outside [0, C); numbers as in the op's first sample."""
    first = next(op.samples(torch.device("cpu")))
    generator = torch.Generator().manual_seed(1000 * batch + classes)
    found = []
    for argument, value in zip(op.dispatched._schema.arguments, first, strict=True):
        if argument.name == "labels":
            labels = torch.randint(classes, (batch,), generator=generator)
            labels[5::11] = torch.tensor([-1, classes, 2**40])[torch.arange(len(labels[5::11])) % 3]
            found.append(labels)
        elif argument.name == "grad":
            found.append(torch.randn(batch, generator=generator).to(compute_dtype(dtype)))
        elif isinstance(value, torch.Tensor):
            found.append((scale * torch.randn(batch, classes, generator=generator)).to(dtype))
        else:
            found.append(value)
    return tuple(found)


def test_the_ops_are_found() -> None:
    assert {"margin", "deviation_radius", "boosted_ce_backward", "dlr_grad", "kl_div"} <= set(ROW_OPS)


@pytest.mark.parametrize("name", ROW_OPS)
def test_sizes_around_a_block(name: str) -> None:
    op = OPS[name]
    sizes = [(batch, 10) for batch in BATCHES] + [(batch, classes) for batch in (1, 37) for classes in CLASSES]
    for number, (batch, classes) in enumerate(sizes):
        for dtype in (torch.float32, (torch.bfloat16, torch.float16, torch.float64)[number % 3]):
            args = arguments(op, batch, classes, dtype)
            compare(op, outcome(op, args, "native"), outcome(op, args), describe(args), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ROW_OPS)
def test_a_row_does_not_depend_on_the_others(name: str, dtype: torch.dtype) -> None:
    """The same bits alone, in a block of rows and beside rows of NaN and infinities."""
    op = OPS[name]
    for classes in (10, 33):
        args = list(arguments(op, 37, classes, dtype))
        matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2]
        for number, row in enumerate((2, 13, 30)):
            for matrix in matrices:
                matrix[row] = (torch.nan, torch.inf, -torch.inf)[number]
        together = outcome(op, tuple(args), "native")
        for row in range(37):
            alone = tuple(a[row : row + 1] if isinstance(a, torch.Tensor) else a for a in args)
            for a, b in zip(outcome(op, alone, "native"), together, strict=True):
                torch.testing.assert_close(a, b[row : row + 1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ROW_OPS)
def test_sums_over_many_classes_stay_exact(name: str) -> None:
    op = OPS[name]
    args = arguments(op, 3, 20_000, scale=0.5)
    compare(op, outcome(op, args, "native"), outcome(op, args), describe(args), args)


@pytest.mark.parametrize("name", ROW_OPS)
def test_reads_nothing_past_the_logits(name: str) -> None:
    """Logits that end where the process's memory does: a page that may not be read follows them."""
    op = OPS[name]
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 8 * page)
    keep = torch.frombuffer(memory, dtype=torch.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    try:
        assert protect(keep.data_ptr() + 7 * page, page, PROT_NONE) == 0
        for batch, classes in ((1, 10), (4, 3), (16, 10), (17, 10), (33, 17), (48, 16)):
            args = arguments(op, batch, classes)
            expected = outcome(op, args, "native")
            size = 4 * batch * classes
            edge = keep[7 * page - size : 7 * page].view(torch.float32).view(batch, classes)
            for position, argument in enumerate(args):
                if isinstance(argument, torch.Tensor) and argument.dim() == 2:
                    moved = (*args[:position], edge.copy_(argument), *args[position + 1 :])
                    result = op.dispatched(*moved)
                    for a, b in zip(result if isinstance(result, tuple) else (result,), expected, strict=True):
                        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    finally:
        protect(keep.data_ptr() + 7 * page, page, mmap.PROT_READ | mmap.PROT_WRITE)
