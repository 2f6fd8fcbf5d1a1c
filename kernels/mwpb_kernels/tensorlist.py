"""What ops over lists of tensors share: their checks, and Triton loops over all tensors in one launch.

The kernels find their tensors through a table of addresses on the device. A kernel fills it, since its
arguments are part of a captured graph, while a copy from the host's memory could not be captured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels.op import IMAGE_DTYPES, Compile, check_device, check_tensors, tl, triton

BLOCK = 1024
# A tensor is spread over at most so many programs: one program adds up all their partial sums at once.
MOST_PARTS = 1024
# A program walks at least so many blocks, so that small tensors do not cost more in launches than in work.
LEAST_BLOCKS = 8
# One launch takes so many addresses: 1 KiB of the 4 KiB that a kernel's arguments may fill on every GPU.
TABLE_ENTRIES = 128


# checks ------------------------------------------------------------------------------------------------------
def as_list(tensors: Iterable[Tensor], name: str) -> list[Tensor]:
    """The tensors of any iterable, such as `model.parameters()`; a tensor is not the list of its rows."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a list of tensors, not a {type(tensors).__name__}")
    found = list(tensors)
    check_tensors(**{f"{name}[{i}]": t for i, t in enumerate(found)})
    return found


def check_lists(params: Sequence[Tensor], **others: Sequence[Tensor]) -> None:
    """Refuse lists that do not match, from metadata alone."""
    for name, tensors in others.items():
        if len(tensors) != len(params):
            raise ValueError(f"{len(params)} params need as many {name}, not {len(tensors)}")
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if t.shape != p.shape or t.dtype != p.dtype:
                wanted, given = f"{tuple(p.shape)} {p.dtype}", f"{tuple(t.shape)} {t.dtype}"
                raise ValueError(f"{name}[{i}] must be {wanted} as params[{i}], not {given}")
    for i, p in enumerate(params):
        if p.dtype not in IMAGE_DTYPES:
            raise TypeError(f"params[{i}] must be float32 or float64, not {p.dtype}")
        check_device(params[0], p, *(tensors[i] for tensors in others.values()))


def check_written(**lists: Sequence[Tensor]) -> None:
    """Refuse to write where elements share memory."""
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
                raise ValueError(f"{name}[{i}] is expanded, so its elements share memory")


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _table_kernel(
    table_ptr,  # (entries,) int64
    pointers,
):
    for i in tl.static_range(len(pointers)):
        tl.store(table_ptr + i, pointers[i].to(tl.int64))


@triton.jit
def part_of(layout_ptr, owner_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A program's tensor, that tensor's row of the layout, and the program's first element and block count."""
    part = tl.program_id(0).to(tl.int64)
    owner = tl.load(owner_ptr + part)
    numel = tl.load(layout_ptr + owner * 4)
    if ALIGNED:  # Together with aligned addresses this lets loads and stores be four elements wide.
        numel = tl.multiple_of(numel, 16)
    blocks = tl.load(layout_ptr + owner * 4 + 1)
    first = tl.load(layout_ptr + owner * 4 + 2)
    parts = tl.load(layout_ptr + owner * 4 + 3)
    return part, owner, numel, first, parts, (part - first) * blocks * BLOCK, blocks


@triton.jit
def tensor_at(table_ptr, entry, ALIGNED: tl.constexpr):
    """The float32 tensor whose address stands at `entry` of the table."""
    pointer = tl.load(table_ptr + entry).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# launching ---------------------------------------------------------------------------------------------------
@functools.cache
def layout_of(numels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """How tensors of these sizes are cut into parts: (T, 4) rows and the (parts,) owners, on the device.

    Kept for good, because captured graphs go on reading it; there is one for each model.
    """
    rows: list[tuple[int, int, int, int]] = []
    owners: list[int] = []
    for tensor, numel in enumerate(numels):
        total = triton.cdiv(numel, BLOCK)
        blocks = max(LEAST_BLOCKS, triton.cdiv(total, MOST_PARTS))
        parts = triton.cdiv(total, blocks)
        rows.append((numel, blocks, len(owners), parts))
        owners += [tensor] * parts
    return torch.tensor(rows, device=device), torch.tensor(owners, device=device)


def launch_arguments(*lists: list[Tensor]) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and shared arguments of the kernels; the table holds the lists' addresses one list after the other."""
    first = lists[0][0]
    layout, owner = layout_of(tuple(t.numel() for t in lists[0]), first.device)
    pointers = [t for tensors in lists for t in tensors]
    table = torch.empty(len(pointers), dtype=torch.int64, device=first.device)
    for start in range(0, len(pointers), TABLE_ENTRIES):
        entries = tuple(pointers[start : start + TABLE_ENTRIES])
        _table_kernel[(1,)](table_ptr=table[start:], pointers=entries)
    return (len(owner),), dict(
        table_ptr=table,
        layout_ptr=layout,
        owner_ptr=owner,
        tensors=len(lists[0]),
        ALIGNED=all(t.data_ptr() % 16 == 0 and t.numel() % 16 == 0 for t in pointers),
        BLOCK=BLOCK,
    )


def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors where their memory can be walked in step as one array, else contiguous copies of them."""
    first = tensors[0]
    dense = first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
    if dense and all(t.stride() == first.stride() for t in tensors):
        return tensors
    return tuple(t.contiguous() for t in tensors)


def flat_lists(*lists: list[Tensor]) -> list[list[Tensor]]:
    """The lists without empty tensors, each group of tensors made `flat`."""
    groups = [flat(*group) for group in zip(*lists, strict=True) if group[0].numel()]
    return [list(tensors) for tensors in zip(*groups, strict=True)]


def write_back(to: list[Tensor], flattened: list[Tensor]) -> None:
    """Copy what was computed in contiguous copies to where it belongs."""
    for target, source in zip((t for t in to if t.numel()), flattened, strict=True):
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)


LAUNCH_TYPES = {"table_ptr": "*i64", "layout_ptr": "*i64", "owner_ptr": "*i64", "tensors": "i32"}
TABLE_COMPILE = Compile(
    kernel=_table_kernel,
    signature={"table_ptr": "*i64", "pointers": ("*fp32",) * 8},  # type: ignore[dict-item]
    constants={},
)
