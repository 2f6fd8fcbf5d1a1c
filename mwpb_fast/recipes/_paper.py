"""What the rows of the paper's tables share: radius, two phases, schedule, attack (MWPB, section 5.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import fixed, margin
from mwpb_fast.config import Config, EvaluationConfig, ModelConfig, OptimConfig
from mwpb_fast.data import dataset
from mwpb_fast.objectives import at, mart, trades
from mwpb_fast.perturbations import none

AT = at.Config()
TRADES = trades.Config(beta=6.0)
# MART's authors have a script for ResNet-18 and one for WideResNets, with these.
MART = mart.Config(beta=5.0)
MART_WRN = mart.Config(beta=6.0)

Recipe = Callable[[], Config]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set, a model and a schedule; its methods make the rows of that table. table: the module that the
    recipes stand in, `__name__`.

    The defaults are the paper's: 110 epochs of SGD, the first 80 of the two-phase rows at eps / 2, learning rate
    divided by 10 in the 80th and the 90th epoch; PGD of 10 steps of a quarter of the radius.
    first_step: that of the warm-up, in place of a quarter of its radius.
    """

    table: str
    data: dataset.Config
    model: str
    optim: OptimConfig
    evaluation: EvaluationConfig
    eps: Fraction = Fraction(8, 255)
    epochs: int = 110
    warmup_epochs: int = 80
    natural_pass: bool = False
    first_step: Fraction | None = None

    def rows(
        self, name: str, objective: Any, alpha: float, start: Literal["gaussian", "uniform"] = "gaussian"
    ) -> tuple[Recipe, Recipe, Recipe]:
        """The recipes of the method `name`: as published, the control and MWPB."""
        end = ", uniform start." if start == "uniform" else "."
        about = f"Plain {name}{_beta(objective)}: radius {self.eps} in every epoch{end}"
        published = self._recipe(lambda: self.plain(objective, start), about)
        return published, self.row(name, objective, 0.0), self.row(name, objective, alpha)

    def row(self, name: str, objective: Any, alpha: float) -> Recipe:
        """The recipe of the method `name` in two phases; alpha = 0 is the control."""
        about = f"{name} in two phases, {self.eps / 2} then {self.eps}: MWPB-{name} with alpha = 0."
        if alpha:
            about = f"MWPB-{name}{_beta(objective)}, alpha = {alpha:g}."
        return self._recipe(lambda: self.two_phase(objective, alpha), about)

    def own(self, about: str, budget: Any, *, warmup: bool = True) -> Recipe:
        """The recipe of AT with another budget, in two phases or with that budget from the first epoch on."""
        epochs = self.warmup_epochs if warmup else 0
        return self._recipe(lambda: self._row(AT, budget, pgd.Config(), epochs), about)

    def fair(self, alpha: float) -> tuple[Recipe, Recipe, Recipe, Recipe, Recipe]:
        """AT, its two-phase control, MWPB-AT, and what is in it apart: how much radius, and who gets it."""
        mwpb = margin.Config(eps=self.eps, alpha=alpha)
        equal = self.own(
            "MWPB-AT with its batch's mean radius for every image: how much radius, not who gets it.",
            dataclasses.replace(mwpb, share="equal"),
        )
        rescaled = self.own(
            f"MWPB-AT with the radii of a batch rescaled to mean {self.eps}: who gets the radius, not how much.",
            dataclasses.replace(mwpb, share="rescaled"),
        )
        return *self.rows("AT", AT, alpha), equal, rescaled

    def _recipe(self, recipe: Recipe, about: str) -> Recipe:
        recipe.__doc__, recipe.__module__ = about, self.table
        return recipe

    def plain(self, objective: Any, start: Literal["gaussian", "uniform"] = "gaussian") -> Config:
        """The objective as published: radius eps in every epoch."""
        return self._row(objective, fixed.Config(eps=self.eps), pgd.Config(start=start), warmup_epochs=0)

    def two_phase(self, objective: Any, alpha: float) -> Config:
        """eps / 2 in the warm-up, then exp(alpha * margin) * eps; alpha = 0 is the control."""
        return self._row(objective, margin.Config(eps=self.eps, alpha=alpha), pgd.Config(), self.warmup_epochs)

    def _row(self, objective: Any, budget: Any, attack: pgd.Config, warmup_epochs: int) -> Config:
        if self.first_step is not None and warmup_epochs:
            attack = dataclasses.replace(attack, warmup_step_size=self.first_step, warmup_epochs=warmup_epochs)
        return Config(
            recipe="",  # filled in by whoever asks for the recipe by its name
            data=self.data,
            model=ModelConfig(name=self.model),
            warmup=fixed.Config(eps=self.eps / 2),
            budget=budget,
            attack=attack,
            objective=objective,
            perturbation=none.Config(),
            optim=self.optim,
            evaluation=self.evaluation,
            epochs=self.epochs,
            warmup_epochs=warmup_epochs,
            natural_pass=self.natural_pass,
        )


def _beta(objective: Any) -> str:
    return f", beta = {objective.beta:g}" if hasattr(objective, "beta") else ""
