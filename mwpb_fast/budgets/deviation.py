"""PROVISIONAL standard-deviation-weighted radius; see `mwpb_kernels.deviation_radius`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mwpb_fast.method import Budget, BudgetConfig
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(BudgetConfig):
    """eps: base radius; alpha: how far the standardised score stretches it. No reproduction claim is made."""

    eps: Fraction = Fraction(8, 255)
    alpha: float = 0.15

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 5:
            raise ValueError(f"alpha must lie in [0, 5], not {self.alpha}")

    def build(self) -> Deviation:
        return Deviation(float(self.eps), self.alpha)


@dataclass(frozen=True)
class Deviation(Budget):
    """budget(logits, y) -> radius (B,) float32, detached."""

    eps: float
    alpha: float

    def __call__(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.deviation_radius(logits, y, self.eps, self.alpha).float()
