"""GAIRAT: samples weighted by how soon the attack overcomes them (Zhang et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mwpb_fast.method import Notes, Objective, ObjectiveConfig
from mwpb_fast.objectives._weighted import Reweighted, base_objective, shared_out
from mwpb_fast.system.lazy import torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """base: the objective whose robust term is weighted. Lambda: -1 as published; the larger, the more equal the
    weights. beta: the base's, its own default where null. The attack must count: pgd with count_correct=true.

    burn_in_epochs: the first epochs, in which the base is not weighted. Published: weights from the 60th of 120
    epochs on; 54 is the same half of 110.
    schedule: of Lambda after the burn-in, laid over schedule_epochs, which should be the run's epochs. fixed:
    Lambda. piecewise: Lambda, Lambda - 1 from 3/4 of them, Lambda - 1.5 from 11/12. linear: in epoch e of N,
    Lambda_max - (Lambda_max - Lambda) e / N; published with Lambda_max infinite, which makes it NaN, so a finite
    one is asked for.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hits"})

    base: str = "at"
    Lambda: float = -1.0
    beta: float | None = None
    burn_in_epochs: int = 54
    schedule: Literal["fixed", "piecewise", "linear"] = "fixed"
    schedule_epochs: int = 110
    Lambda_max: float = 5.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.Lambda) and math.isfinite(self.Lambda_max)):
            raise ValueError(f"Lambda and Lambda_max must be finite, not {self.Lambda} and {self.Lambda_max}")
        if self.schedule == "linear" and self.Lambda_max < self.Lambda:
            raise ValueError(f"Lambda falls from Lambda_max: {self.Lambda_max} is below {self.Lambda}")
        if self.burn_in_epochs < 0 or self.schedule_epochs < 1:
            raise ValueError("burn_in_epochs must not be negative, schedule_epochs must be at least 1")
        base_objective(self.base, self.beta)

    def lambda_in(self, epoch: int) -> float:
        """Lambda in an epoch, counted from 1."""
        share = min(epoch / self.schedule_epochs, 1.0)
        above = {
            "fixed": 0.0,
            "piecewise": -1.5 if share >= 11 / 12 else -1.0 if share >= 3 / 4 else 0.0,
            "linear": (self.Lambda_max - self.Lambda) * (1 - share),
        }
        return self.Lambda + above[self.schedule]

    def build(self) -> GAIRAT:
        return GAIRAT(base_objective(self.base, self.beta), self, self.Lambda)


@dataclass(frozen=True)
class GAIRAT(Reweighted):
    """outer: the base's with its robust term times w_i over its mean in the batch; inner: the base's.

    w_i = (1 + tanh(Lambda + 5 (1 - 2 kappa_i / K))) / 2, kappa_i of the K iterates of the attack being classified
    right. It is a total count, not the time of the first mistake; the released code counts so too.
    """

    config: Config
    Lambda: float

    def weight(self, logits: torch.Tensor, y: torch.Tensor, notes: Notes | None = None) -> torch.Tensor:
        """Mean 1 over the batch, a constant. notes: with "hits", (B,), kappa_i / K."""
        if notes is None or "hits" not in notes:
            raise ValueError('GAIRAT needs notes["hits"] of the attack: pgd.Config(count_correct=True)')
        score = self.Lambda + 5 * (1 - 2 * notes["hits"].float())
        # (1 + tanh(u)) / 2 = sigmoid(2u), which does not cancel
        return shared_out(torch.nn.functional.logsigmoid(2 * score))

    def in_epoch(self, epoch: int) -> Objective:
        """The base during the burn-in, then this with the epoch's Lambda; epoch: counted from 1."""
        if epoch <= self.config.burn_in_epochs:
            return self.base
        return dataclasses.replace(self, Lambda=self.config.lambda_in(epoch))
