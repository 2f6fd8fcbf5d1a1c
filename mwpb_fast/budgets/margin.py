"""MWPB: radius exp(alpha * margin) * eps (MWPB, Eq. 2 and 3). alpha = 0 is the two-phase control."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mwpb_fast.budgets._share import Share, check_share, shared
from mwpb_fast.method import Budget, BudgetConfig
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(BudgetConfig):
    """eps: base radius; alpha: how far the probability margin stretches it, as exp(alpha * margin).

    form: what stands for the margin. plain: itself; reversed: its negative, so that the samples that are wrong
    or nearly so have the large radii; signed: itself where it is positive, else 0, so that no radius is below eps.
    share: own, each sample has its radius; rescaled, those of a batch are scaled to mean eps: who gets the radius
    without how much; equal, every sample has the batch's mean: how much without who.
    """

    eps: Fraction = Fraction(8, 255)
    alpha: float = 0.58
    form: Literal["plain", "reversed", "signed"] = "plain"
    share: Share = "own"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 5:
            raise ValueError(f"alpha must lie in [0, 5], not {self.alpha}")
        if self.form not in ("plain", "reversed", "signed"):
            raise ValueError(f"form must be plain, reversed or signed, not {self.form}")
        check_share(self.share)

    def build(self) -> Margin:
        return Margin(float(self.eps), self.alpha, self.form, self.share)


@dataclass(frozen=True)
class Margin(Budget):
    """budget(logits, y) -> radius (B,) float32, detached; its own lies in [exp(-alpha), exp(alpha)] * eps."""

    eps: float
    alpha: float
    form: str = "plain"
    share: Share = "own"

    def __call__(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        alpha = -self.alpha if self.form == "reversed" else self.alpha
        radius = ops.margin_radius(logits, y, self.eps, alpha).float()
        if self.form == "signed":
            radius = radius.clamp(min=self.eps)  # exp(alpha * margin) is below 1 just where the margin is below 0
        return shared(radius, self.eps, self.share)
