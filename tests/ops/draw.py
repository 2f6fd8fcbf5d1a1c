"""Random cases of an op, made from its samples: sizes, values, layouts.

Dimensions that have the same size in every sample are taken to be the same dimension, and are drawn anew;
values are drawn from the sample's values, so that a radius stays positive and an image in [0, 1], and special
ones are mixed in.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cases import EXPANDED, LAYOUTS, OPS, SPECIAL, inject, samples, tensors, tree
from mwpb_kernels.op import Op

SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 33, 40, 67)
LARGEST = 6000


def group_of(op: Op, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The op's samples that differ from `args` in sizes and types alone."""

    def form(a: tuple[Any, ...]) -> Any:
        return tree(lambda t: t.dim(), a)

    return [s for s in samples(op) if form(s) == form(args)]


def dimensions(op: Op, args: tuple[Any, ...]) -> tuple[list[list[int]], list[int], list[int]]:
    """For each tensor the symbols of its dimensions; for each symbol its size in `args` and its least size."""
    ranks = [t.dim() for t in tensors(args)]
    related = [tensors(s) for s in samples(op) if [t.dim() for t in tensors(s)] == ranks]
    own = [tensors(s) for s in group_of(op, args)]
    symbols: dict[tuple[int, ...], int] = {}
    names = []
    for i, rank in enumerate(ranks):
        seen = [tuple(r[i].shape[d] for r in related) for d in range(rank)]
        names.append([symbols.setdefault(s, len(symbols)) for s in seen])
    size, least = [0] * len(symbols), [10**9] * len(symbols)
    for i, dims in enumerate(names):
        for d, symbol in enumerate(dims):
            size[symbol] = tensors(args)[i].shape[d]
            least[symbol] = min(r[i].shape[d] for r in own)
            if all(r[i].shape[d] == 1 for r in related):
                size[symbol] = -1  # fixed: a seed's one element
    return names, size, least


def resized(t: torch.Tensor, pool: torch.Tensor, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """A tensor of the shape with values drawn from the pool."""
    count = int(torch.Size(shape).numel())
    if not len(pool):
        pool = torch.ones(1, dtype=t.dtype)
    return pool[torch.randint(len(pool), (count,), generator=generator)].view(shape)


def indices(op: Op, args: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    """Labels and indices that fit the drawn sizes; one label in ten lies outside the classes."""
    names = [a.name for a in op.dispatched._schema.arguments]
    by_name = dict(zip(names, args, strict=True))
    out = list(args)
    for i, name in enumerate(names):
        t = args[i]
        if not isinstance(t, torch.Tensor) or t.dtype != torch.int64:
            continue
        if name == "labels":
            classes = next(a.shape[1] for a in args if isinstance(a, torch.Tensor) and a.dim() == 2)
            out[i] = torch.randint(classes, t.shape, generator=generator)
            wrong = torch.rand(t.shape, generator=generator) < 0.1
            out[i][wrong] = torch.tensor([-1, classes, -(2**63), 2**63 - 1])[
                torch.randint(4, (int(wrong.sum()),), generator=generator)
            ]
        elif name == "index" and "images" in by_name:
            count = len(by_name["images"])
            out[i] = torch.randint(count, t.shape, generator=generator) if count else t[:0]
        else:
            out[i] = torch.randint(-(2**62), 2**62, t.shape, generator=generator)
    return tuple(out)


def draw_case(op: Op, generator: torch.Generator) -> tuple[Any, ...]:
    """Arguments of random sizes, values and layouts."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    cases = cases_of(op.name)
    sample, (names, size, least) = cases[pick(len(cases))]
    drawn = []
    for now, low in zip(size, least, strict=True):
        fitting = [s for s in SIZES if s >= low] or [now, now + 1, now + 3]
        drawn.append(1 if now == -1 else fitting[pick(len(fitting))])
    while max((int(torch.Size([drawn[s] for s in dims]).numel()) for dims in names), default=0) > LARGEST:
        largest = max(range(len(drawn)), key=lambda s: drawn[s] / max(1, least[s]))
        drawn[largest] = max(least[largest], drawn[largest] // 2)
        if all(d <= max(1, low) for d, low in zip(drawn, least, strict=True)):
            break
    shapes = iter([[drawn[s] for s in dims] for dims in names])
    pools = iter(tensors(sample))
    args = tree(lambda t: resized(t, next(pools).reshape(-1), next(shapes), generator), sample)
    args = indices(op, args if op.fit is None else op.fit(*args), generator)
    specials = tuple(s for s in (*SPECIAL, 1e4, -1e4) if pick(3) == 0) if pick(3) == 0 else ()
    if specials:
        position = pick(len(args))
        if op.name.endswith("_backward") and position == 0:
            # whether a subnormal probability is flushed to zero is the processor's choice, and infinity times
            # it is then NaN or infinity; the parity tests send infinite gradients to ordinary probabilities
            specials = tuple(s for s in specials if abs(s) != float("inf"))
        args = (
            *args[:position],
            tree(lambda t: inject(t, specials, generator) if t.dtype.is_floating_point else t, args[position]),
            *args[position + 1 :],
        )
    changed = []
    for i, argument in enumerate(args):
        ways = [lambda t: t, *LAYOUTS.values(), *(() if i in op.mutates else EXPANDED.values())]
        way = ways[pick(len(ways))]
        changed.append(tree(lambda t, way=way: way(t) if t.numel() else t, argument))
    return tuple(changed)


@cache
def cases_of(name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """The samples that have elements, with their dimensions."""
    op = OPS[name]
    return [(s, dimensions(op, s)) for s in samples(op, 200_000) or samples(op)]
