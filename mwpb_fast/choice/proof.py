"""Whether a captured step does what the eager one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mwpb_fast.capture import CapturedStep, same_bits

SPREAD = 10  # times the distance of two eager steps
MOST = 0.05  # distance of anything from the eager step, relative

Outcome = Mapping[str, torch.Tensor]


def flaw(captured: CapturedStep, *arguments: Any) -> str:
    """In what a replay is wrong; empty where it gives the eager step's bits.

    Where eager steps do not repeat their own bits, as some convolutions' gradients do not on CUDA, a replay may be
    ten times as far from one as two of them are from each other. arguments: as `CapturedStep.verify` has them.
    """
    first, second, replayed = captured.outcomes(*arguments, eager=2)
    differing = _differing(first, replayed)
    if not differing:
        return ""
    own = set(_differing(first, second))
    for group in sorted({name.partition(".")[0] for name in differing}):
        names = [name for name in differing if name.startswith(f"{group}.")]
        exact = [name for name in names if not first[name].is_floating_point()]
        members = [name for name in first if name.startswith(f"{group}.") and first[name].is_floating_point()]
        apart = _apart(first, replayed, members)
        allowed = min(MOST, SPREAD * _apart(first, second, members)) if own else 0.0
        if exact or not apart <= allowed:
            names = exact or names
            return f"a replay differs from the eager step in {names[0]} and {len(differing) - 1} more"
    return ""


def _differing(one: Outcome, other: Outcome) -> list[str]:
    return [name for name, value in one.items() if not same_bits(value, other[name])]


def _apart(one: Outcome, other: Outcome, names: list[str]) -> float:
    """Distance of the tensors of those names, relative to the first ones' norm."""
    if not names:
        return 0.0
    apart, size = (
        torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors]).norm()
        for tensors in ([one[n] - other[n] for n in names], [one[n] for n in names])
    )
    return (apart / size.clamp_min(1e-30)).item()
