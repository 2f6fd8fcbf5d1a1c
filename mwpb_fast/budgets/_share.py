"""What becomes of the radii of a batch when each sample has its own: kept, or shared out otherwise."""

from __future__ import annotations

from typing import Literal

from mwpb_fast.system import ranks
from mwpb_fast.system.lazy import torch

Share = Literal["own", "rescaled", "equal"]


def shared(radius: torch.Tensor, eps: float, share: Share) -> torch.Tensor:
    """The radii (B,) of a batch as they are; or scaled to mean eps; or their mean for every sample."""
    if share == "rescaled" and eps:
        return radius * (eps / ranks.mean(radius.mean()))
    return ranks.mean(radius.mean()).expand_as(radius).clone() if share == "equal" else radius


def check_share(share: str) -> None:
    """Raises ValueError for another word."""
    if share not in ("own", "rescaled", "equal"):
        raise ValueError(f"share must be own, rescaled or equal, not {share}")
