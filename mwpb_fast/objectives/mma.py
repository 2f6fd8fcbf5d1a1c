"""MMA: enlarge margins below d_max, learn what is not yet right (Ding et al., "MMA training", ICLR 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mwpb_fast.attacks.anpgd import ascend_soft_margin
from mwpb_fast.method import Notes, Objective, ObjectiveConfig
from mwpb_fast.system.lazy import torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """clean_weight: share of the natural cross-entropy (1/3 is the authors', 0 their OMMA). Needs attack anpgd."""

    clean_weight: float = 1 / 3
    needs: ClassVar[frozenset[str]] = frozenset({"counted"})

    def __post_init__(self) -> None:
        if not 0 <= self.clean_weight < 1:
            raise ValueError(f"clean_weight must lie in [0, 1), not {self.clean_weight}")

    def build(self) -> MMA:
        return MMA(self.clean_weight)


@dataclass(frozen=True)
class MMA(Objective):
    """outer: c * mean CE(x_i) + (1 - c) / B * [sum_{S+, d_i < d_max} CE(x'_i) + sum_{S-} CE(x_i)].

    The denominator stays B: samples of S+ with a margin of d_max or more add 0. The attack gives one batch of x'
    for S+ and x for S- and says as "counted" which of them enter. With c > 0 the natural batch goes through the
    model once more, first, with batch statistics of its own, as in the authors' code.

    Speed: two outer passes like TRADES, one with c = 0; bf16 applies, and a CUDA graph can hold it.
    """

    clean_weight: float
    uses_clean = True
    inner = staticmethod(ascend_soft_margin)

    @property
    def sends_natural(self) -> bool:  # type: ignore[override]
        """Whether the natural cross-entropy counts."""
        return self.clean_weight > 0

    def outer(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        x_adv: torch.Tensor,
        y: torch.Tensor,
        notes: Notes | None = None,
    ) -> torch.Tensor:
        """Scalar loss to descend; model in train mode. notes: "counted" (B,) bool."""
        if notes is None or "counted" not in notes:
            raise ValueError("MMA's loss needs what attack anpgd notes as 'counted'")
        cross_entropy = torch.nn.functional.cross_entropy
        natural = cross_entropy(model(x).float(), y) if self.clean_weight else 0.0
        mixed = torch.where(notes["counted"], cross_entropy(model(x_adv).float(), y, reduction="none"), 0.0).mean()
        return self.clean_weight * natural + (1 - self.clean_weight) * mixed
