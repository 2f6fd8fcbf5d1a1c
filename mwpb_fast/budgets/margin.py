"""MWPB: radius exp(alpha * margin) * eps (MWPB, Eq. 2 and 3). alpha = 0 is the two-phase control."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mwpb_fast.method import Budget, BudgetConfig
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(BudgetConfig):
    """eps: base radius; alpha: how far the probability margin stretches it, as exp(alpha * margin)."""

    eps: Fraction = Fraction(8, 255)
    alpha: float = 0.58

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 5:
            raise ValueError(f"alpha must lie in [0, 5], not {self.alpha}")

    def build(self) -> Margin:
        return Margin(float(self.eps), self.alpha)


@dataclass(frozen=True)
class Margin(Budget):
    """budget(logits, y) -> radius (B,) float32 in [exp(-alpha), exp(alpha)] * eps, detached."""

    eps: float
    alpha: float

    def __call__(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.margin_radius(logits, y, self.eps, self.alpha).float()
