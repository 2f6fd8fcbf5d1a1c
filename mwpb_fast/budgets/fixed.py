"""The same radius for every sample: plain adversarial training, and the first phase of MWPB."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mwpb_fast.method import Budget, BudgetConfig
from mwpb_fast.system.lazy import torch


@dataclass(frozen=True, kw_only=True)
class Config(BudgetConfig):
    """eps: radius of every sample's ball, in the units of images in [0, 1]."""

    eps: Fraction = Fraction(8, 255)

    def build(self) -> Fixed:
        return Fixed(float(self.eps))


@dataclass(frozen=True)
class Fixed(Budget):
    """budget(logits, y) -> radius (B,) float32; the logits are not looked at and may be None."""

    eps: float
    uses_logits = False

    def __call__(self, logits: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        return torch.full(y.shape, self.eps, device=y.device)
