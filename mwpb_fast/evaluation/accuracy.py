"""Which images a model still gets right under an attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from mwpb_fast.system.lazy import torch

if TYPE_CHECKING:
    from mwpb_fast.method import Net

Perturb = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def correct(
    net: Net,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    perturb: Perturb | None = None,
    tick: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """(N,) boolean on the CPU: is the prediction right after perturb(x, y, index) -> x_adv?

    batches: of x, y, index as loaders give them; perturb None: on the natural images. tick: called with the
    number of images after each batch.
    """
    flags = [torch.zeros(0, dtype=torch.bool)]
    for x, y, index in batches:
        logits = net.logits(x if perturb is None else perturb(x, y, index))
        flags.append(right(logits, y).cpu())
        if tick is not None:
            tick(len(y))
    return torch.cat(flags)


def sound(logits: torch.Tensor) -> torch.Tensor:
    """(B,) boolean: whether (B, classes) logits say anything: no NaN, no +inf, and not all of them -inf. A class
    that a model rules out by -inf is no fault."""
    return logits.amax(1).isfinite()


def right(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B,) boolean: whether (B, classes) logits predict the labels y. Those that are not sound count as wrong."""
    return predicted(logits) == y


def predicted(logits: torch.Tensor) -> torch.Tensor:
    """(B,) int64: the class that (B, classes) logits predict; -1 where they are not sound."""
    return logits.argmax(1).where(sound(logits), torch.tensor(-1, device=logits.device))
