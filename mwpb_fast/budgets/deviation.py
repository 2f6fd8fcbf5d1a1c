"""SDWPB: radius exp(alpha * s) * eps, s the deviation of the probabilities from the true class's; the formula that
its authors released, see `mwpb_kernels.deviation_radius`. No table of theirs is claimed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from mwpb_fast.budgets._share import Share, check_share, shared
from mwpb_fast.method import Budget, BudgetConfig
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(BudgetConfig):
    """eps: base radius; alpha: how far the deviation stretches it (.52 as released, with eps .031).

    form: plain, s = sqrt(sum_k (p_k - p_y)^2 / (C - 1)), which never shrinks a radius; signed, the same where
    the margin is not negative, else 0, as in other code of the same author; standardised, (p_y - mean p) / std p,
    an earlier reading here.
    share: as of budget margin.
    """

    earlier: ClassVar[Mapping[str, Any]] = MappingProxyType({"form": "standardised"})
    eps: Fraction = Fraction(8, 255)
    alpha: float = 0.15
    form: Literal["plain", "signed", "standardised"] = "plain"
    share: Share = "own"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 5:
            raise ValueError(f"alpha must lie in [0, 5], not {self.alpha}")
        if self.form not in ("plain", "signed", "standardised"):
            raise ValueError(f"form must be plain, signed or standardised, not {self.form}")
        check_share(self.share)

    def build(self) -> Deviation:
        return Deviation(float(self.eps), self.alpha, self.form, self.share)


@dataclass(frozen=True)
class Deviation(Budget):
    """budget(logits, y) -> radius (B,) float32, detached."""

    eps: float
    alpha: float
    form: str = "plain"
    share: Share = "own"

    def __call__(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        formula = ops.standardised_radius if self.form == "standardised" else ops.deviation_radius
        radius = formula(logits, y, self.eps, self.alpha).float()
        if self.form == "signed":
            radius = torch.where(ops.margin(logits, y) < 0, self.eps, radius)  # a NaN stays
        return shared(radius, self.eps, self.share)
