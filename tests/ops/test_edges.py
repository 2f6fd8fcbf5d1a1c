"""Dimensions of size 0 and labels outside the classes, in every op that has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import NAMES, OPS, RUNNERS, compare, describe, outcome, replace, samples, tensors, tree
from draw import dimensions
from mwpb_kernels.op import Op


def emptied(op: Op, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments with each of their dimensions in turn of size 0, in all tensors that have it."""
    names, size, _ = dimensions(op, args)
    found = []
    classes = {dims[1] for dims in names if op.takes[0].startswith("logits") and len(dims) == 2}  # two at least
    for symbol in (s for s, n in enumerate(size) if n > 0 and s not in classes):
        kept = iter(names)

        def cut(t: torch.Tensor, kept: Any = kept, symbol: int = symbol) -> torch.Tensor:
            where = tuple(slice(0) if s == symbol else slice(None) for s in next(kept))
            return t[where].clone()

        made = tree(cut, args)
        try:
            found.append(made if op.fit is None else op.fit(*made))
        except RuntimeError:  # with it the others cannot have a size
            continue
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_dimension_of_size_0(name: str) -> None:
    """Each of an op's dimensions alone: what the reference makes of it, if it takes it."""
    op, seen = OPS[name], 0
    for sample in samples(op, 4000)[-3:]:
        for args in emptied(op, sample):
            what = describe(args)
            try:
                expected = outcome(op, args)
            except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
                continue
            for runner in (r for r in RUNNERS if r != "reference"):
                compare(op, outcome(op, args, runner), expected, f"{runner}: {what}", args)
                seen += 1
    assert seen


@pytest.mark.parametrize("name", [n for n in NAMES if "labels" in OPS[n].takes])
def test_labels_outside_the_classes(name: str) -> None:
    """In every row, or in one beside ordinary ones: NaN there, or no gradient, and nothing else is touched."""
    op = OPS[name]
    place = op.takes.index("labels")
    for sample in [s for s in samples(op, 4000) if s[place].numel()][-2:]:
        classes = tensors(sample)[0 if place == 1 else 1].shape[1]
        for wrong in (-1, classes, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)):
            for rows in (slice(None), slice(-1, None)):
                labels = sample[place].clone()
                labels[rows] = wrong
                args = replace(sample, place, labels)
                expected = outcome(op, args)
                for runner in (
                    "native",
                    *(["triton"] if "triton" in RUNNERS and wrong in (-1, 2**63 - 1) else []),
                ):
                    compare(op, outcome(op, args, runner), expected, f"{runner}: {wrong}: {describe(args)}", args)
