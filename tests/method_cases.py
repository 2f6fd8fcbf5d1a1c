"""Methods for tests: one with the axes that matter, and attacks that are a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import margin
from mwpb_fast.config import load
from mwpb_fast.method import Attack, Method
from mwpb_fast.perturbations import none


def method(objective: Any = "at", **axes: Any) -> Method:
    """objective: a name, or one that is built. axes: what is to differ from margin, pgd of two steps and none."""
    built: dict[str, Any] = {
        "budget": margin.Config().build(),
        "attack": pgd.Config(steps=2).build(),
        "objective": load("objectives", objective).Config().build() if isinstance(objective, str) else objective,
        "perturb": none.Config().build(),
    }
    return Method(**{**built, **axes})


@dataclass(frozen=True)
class Crafted(Attack):
    """An attack that is any function of its arguments."""

    function: Callable[..., torch.Tensor]

    def __call__(self, *arguments: Any) -> torch.Tensor:
        return self.function(*arguments)
