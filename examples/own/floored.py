"""A budget: the margin's radius, never less than a share of eps. `--budget own.floored --budget.floor 0.75`."""

from dataclasses import dataclass
from fractions import Fraction

from mwpb_fast.method import Budget, BudgetConfig
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(BudgetConfig):
    """eps: radius at margin 0. alpha: how much the margin matters. floor: of a radius, in units of eps."""

    eps: Fraction = Fraction(8, 255)
    alpha: float = 0.58
    floor: float = 0.5

    def build(self) -> "Floored":
        return Floored(float(self.eps), self.alpha, self.floor)


@dataclass(frozen=True)
class Floored(Budget):
    eps: float
    alpha: float
    floor: float

    def __call__(self, logits: "torch.Tensor", y: "torch.Tensor") -> "torch.Tensor":
        return ops.margin_radius(logits, y, self.eps, self.alpha).clamp(min=self.floor * self.eps)
