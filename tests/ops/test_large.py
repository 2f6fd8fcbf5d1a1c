"""Addresses beyond 32 bits: strides past 2^31 in the ordinary run, more than 2^31 elements in the slow one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    NAMES,
    OPS,
    TRITON_DEVICE,
    WHOLE_BATCH,
    compare,
    describe,
    plain_copy,
    replace,
    samples,
    tensors,
    tree,
)
from draw import dimensions
from mwpb_kernels.op import Op

pytestmark = pytest.mark.unpoisoned  # the memory between the elements must stay untouched: it is only promised

BEYOND = 2**31 + 64


def spread(t: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy whose elements along `dim` reach beyond 2^31 elements. Untouched pages of it cost no memory."""
    stride = list(t.contiguous().stride())
    stride[dim] = BEYOND // (t.shape[dim] - 1) + 1
    size = sum((n - 1) * s for n, s in zip(t.shape, stride, strict=True)) + 1
    try:
        out = torch.empty(size, dtype=t.dtype).as_strided(t.shape, stride)
    except RuntimeError as error:
        pytest.skip(f"the system does not promise {size * t.element_size() / 2**30:.0f} GiB: {error}")
    return out.copy_(t)


def wide_samples(op: Op) -> list[tuple[Any, ...]]:
    """For each set of ranks among an op's samples, the one with most dimensions that have a stride to test."""

    def length(args: tuple[Any, ...]) -> int:
        return sum(n > 1 for t in tensors(args) for n in t.shape)

    best: dict[tuple[int, ...], tuple[Any, ...]] = {}
    for args in samples(op, 4000):
        ranks = tuple(t.dim() for t in tensors(args))
        if ranks not in best or length(args) > length(best[ranks]):
            best[ranks] = args
    return list(best.values())


@pytest.mark.parametrize("name", NAMES)
def test_strides_beyond_32_bits(name: str) -> None:
    """Each dimension of each argument, alone, with a stride that takes its last element past 2^31."""
    op = OPS[name]
    checked = set()
    for args in wide_samples(op):
        for position, argument in enumerate(args):
            first = next(iter(tensors(argument)), torch.empty(()))
            for dim in (d for d, n in enumerate(first.shape) if n > 1):
                changed = plain_copy(args)
                wide = spread(first, dim)
                wide = wide if isinstance(argument, torch.Tensor) else [wide, *changed[position][1:]]
                changed = replace(changed, position, wide)
                expected = plain_copy(args)
                reference = tensors(op.reference(*expected))
                actual = tensors(op.dispatched(*changed))
                for i in op.mutates:
                    reference += tensors(expected[i])
                    actual += [t.contiguous() for t in tensors(changed[i])]
                compare(op, actual, reference, f"argument {position}, dimension {dim}: {describe(changed)}")
                checked.add(position)
    several = {i for s in wide_samples(op) for i, a in enumerate(s) if any(t.numel() > 1 for t in tensors(a))}
    assert checked == several
    assert several


def available() -> int:
    """Bytes of memory that can be had without swapping."""
    if TRITON_DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def per_sample(op: Op, args: tuple[Any, ...]) -> set[int]:
    """The tensor arguments whose first dimension counts samples, as that of the labels or the index does."""
    names = [a.name for a in op.dispatched._schema.arguments]
    positions = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    symbols = dict(zip(positions, dimensions(op, args)[0], strict=True))
    counting = next((i for i in positions if names[i] in ("labels", "index")), positions[0])
    return {i for i in positions if symbols[i] and symbols[i][0] == symbols[counting][0]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in WHOLE_BATCH])
def test_more_than_2_31_elements(name: str) -> None:
    """Every sample the same (but for its index), so each row of the result is known from a few of them."""
    op = OPS[name]
    fitting = [s for s in samples(op) if all(t.numel() and t.dtype != torch.float64 for t in tensors(s))]
    args = max(fitting, key=lambda s: sum(t.numel() for t in tensors(s)))
    lists = [i for i, a in enumerate(args) if isinstance(a, list)]
    if lists:
        rows = BEYOND
        few = tuple([a[0].reshape(-1)[:1].expand(5)] if i in lists else a for i, a in enumerate(args))
    else:
        shared = per_sample(op, args)
        batch = args[min(shared)].shape[0]
        results = [t for t in tensors(op.reference(*plain_copy(args))) if t.shape[:1] == (batch,)]
        rows = BEYOND // max(t.numel() // batch for t in (*results, *(args[i] for i in shared))) + 5
        few = tuple(a[:1].expand(5, *a.shape[1:]) if i in shared else a for i, a in enumerate(args))
    names = [a.name for a in op.dispatched._schema.arguments]

    def grown(i: int, t: torch.Tensor) -> torch.Tensor:
        if i not in (lists or shared):
            return t
        full = t[:1].to(TRITON_DEVICE).expand(rows, *t.shape[1:])
        if names[i] == "index" and "images" not in names:
            return torch.arange(rows, device=TRITON_DEVICE)
        return full.clone() if i in op.mutates else full

    size = max(t.numel() for t in tensors(few)) // 5 * rows
    expected_bytes = sum(t.numel() // 5 * rows * t.element_size() for t in tensors(op.reference(*plain_copy(few))))
    expected_bytes += sum(t.numel() // 5 * rows * t.element_size() for i in op.mutates for t in tensors(few[i]))
    if "index" in names:
        expected_bytes += rows * 8
    if available() < 1.15 * expected_bytes:
        pytest.skip(f"needs {expected_bytes / 2**30:.1f} GiB, {available() / 2**30:.1f} are free")
    assert size >= 2**31 or any(t.numel() // 5 * rows >= 2**31 for t in tensors(op.reference(*plain_copy(few))))

    many = tuple(tree(lambda t, i=i: grown(i, t), a) for i, a in enumerate(few))
    actual = tensors(op.dispatched(*many))
    for i in op.mutates:
        actual += tensors(many[i])
    for start in (0, rows // 2, rows - 5):
        small = list(plain_copy(few))
        for i, n in enumerate(names):
            if n == "index" and "images" not in names:
                small[i] = torch.arange(start, start + 5)
        reference = tensors(op.reference(*small))
        for i in op.mutates:
            reference += tensors(small[i])
        compare(op, [t[start : start + 5].cpu() for t in actual], reference, f"rows from {start}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_batch_norm_of_more_than_2_31_elements() -> None:
    """Of one image over and over: the same statistics and gradients, and sums that are the count times its own."""
    one = torch.randn(1, 8, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    count = BEYOND // one.numel() + 2
    if available() < 1.15 * 2 * (2 * count * one.numel()):
        pytest.skip(f"needs {4 * count * one.numel() / 2**30:.1f} GiB, {available() / 2**30:.1f} are free")
    weight, bias, mean, var = torch.rand(8) + 0.5, torch.rand(8), torch.zeros(8), torch.ones(8)
    forward, backward = OPS["batch_norm_relu"].dispatched, OPS["batch_norm_relu_backward"].dispatched
    grad, found = torch.randn_like(one), []
    for n in (2, count):
        x = one.to(TRITON_DEVICE).expand(n, -1, -1, -1)
        vectors = [t.to(TRITON_DEVICE) for t in (weight, bias, mean, var)]
        out, batch_mean, invstd, gate, *_ = forward(x, *vectors, None, 0.1, 1e-3)
        kept, out = out[[0, -1]].cpu(), None
        of_x, of_weight, of_bias, _ = backward(
            grad.to(TRITON_DEVICE).expand_as(x), x, vectors[0], batch_mean, invstd, gate, False
        )
        found.append((kept, of_x[[0, -1]].cpu(), of_weight.cpu() / n, of_bias.cpu() / n))
        del of_x, gate
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-7, atol=2e-3 if a.dim() == 4 else 2e-2)
