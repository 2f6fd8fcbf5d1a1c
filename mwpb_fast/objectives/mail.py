"""MAIL: samples weighted by a sigmoid of their adversarial probability margin (Wang et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mwpb_fast.method import Notes, Objective, ObjectiveConfig
from mwpb_fast.objectives._weighted import Reweighted, base_objective, shared_out
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """base: the objective whose robust term is weighted. bias, slope: of the sigmoid; published: -0.5 and 10 on
    at, 0 and 2 on trades. beta: the base's, its own default where null; published: 5.

    weights: times3, 3 w_i, as in the released code, whose README gives the published bias and slope; normalised,
    w_i over its mean in the batch, the paper's form as far as it is known here.
    burn_in_epochs: the first epochs, in which the base is not weighted. In the released schedule they end with the
    epoch of the first drop of the learning rate, the 76th; that is the 80th of the 110 here.
    """

    base: str = "at"
    bias: float = -0.5
    slope: float = 10.0
    beta: float | None = None
    weights: Literal["times3", "normalised"] = "times3"
    burn_in_epochs: int = 80

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bias) and 0 <= self.slope < math.inf):
            raise ValueError(
                f"bias must be finite, slope finite and not negative, not {self.bias} and {self.slope}"
            )
        if self.burn_in_epochs < 0:
            raise ValueError(f"burn_in_epochs must not be negative, not {self.burn_in_epochs}")
        base_objective(self.base, self.beta)

    def build(self) -> MAIL:
        return MAIL(base_objective(self.base, self.beta), self)


@dataclass(frozen=True)
class MAIL(Reweighted):
    """outer: the base's with its robust term times w_i = sigmoid(-slope * (PM_i - bias)); inner: the base's.

    PM_i is the probability margin of the adversarial image in the outer pass; no gradient flows through w_i. Of
    MART the boosted cross-entropy is weighted, its KL is not.
    """

    config: Config

    def weight(self, logits: torch.Tensor, y: torch.Tensor, notes: Notes | None = None) -> torch.Tensor:
        """3 w_i, or w_i over its mean; a constant."""
        slope, bias = self.config.slope, self.config.bias
        score = -slope * (ops.margin(logits.detach(), y) - bias)
        if self.config.weights == "normalised":
            return shared_out(torch.nn.functional.logsigmoid(score))
        return 3 * torch.sigmoid(score)

    def in_epoch(self, epoch: int) -> Objective:
        """The base during the burn-in; epoch: counted from 1."""
        return self.base if epoch <= self.config.burn_in_epochs else self
