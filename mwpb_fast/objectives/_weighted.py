"""What the re-weighting objectives share: the base, found by its name, and its loss with a weight a sample."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass

from mwpb_fast.config import axis_config, names
from mwpb_fast.method import Inner, Notes, Objective
from mwpb_fast.objectives._terms import Weighable
from mwpb_fast.system import ranks
from mwpb_fast.system.lazy import torch


def base_objective(name: str, beta: float | None) -> Weighable:
    """The built objective `name`, with its own default beta where `beta` is None.

    Raises ValueError where there is no such objective, where it has no beta to set, and where its loss does not
    come in terms (objectives/_terms.py), so that there is no robust term to weigh.
    """
    config = axis_config("objectives", name)
    if beta is not None:
        if all(field.name != "beta" for field in dataclasses.fields(config)):
            raise ValueError(f"base {name} has no beta: leave it null")
        config = dataclasses.replace(config, beta=beta)
    base = config.build()
    if not isinstance(base, Weighable):
        fitting = [n for n in names("objectives") if isinstance(axis_config("objectives", n).build(), Weighable)]
        raise ValueError(f"base {name} does not give its loss in terms to weigh: take {' or '.join(fitting)}")
    return base


def shared_out(log_w: torch.Tensor) -> torch.Tensor:
    """w_i over its mean in the whole batch, (B,), from log w_i: it has no 0 / 0 where every w underflows."""
    every = ranks.whole(log_w)
    return ranks.own(len(every) * torch.softmax(every, dim=0))


@dataclass(frozen=True)
class Reweighted(Objective):
    """outer: rest + mean_i w_i weighted_i of the base's terms; inner: the base's."""

    base: Weighable

    @property
    def uses_clean(self) -> bool:
        """Whether the attack needs the natural logits."""
        return self.base.uses_clean

    @property
    def sends_natural(self) -> bool:  # type: ignore[override]
        """Whether the base does."""
        return self.base.sends_natural

    @property
    def inner(self) -> Inner:
        """What the attack ascends."""
        return self.base.inner

    def outer(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        x_adv: torch.Tensor,
        y: torch.Tensor,
        notes: Notes | None = None,
    ) -> torch.Tensor:
        """Scalar loss to descend; model in train mode."""
        terms = self.base.terms(model, x, x_adv, y)
        return terms.rest + (self.weight(terms.logits, y, notes) * terms.weighted).mean()

    @abstractmethod
    def weight(self, logits: torch.Tensor, y: torch.Tensor, notes: Notes | None = None) -> torch.Tensor:
        """(B,) float32, the factor of each sample's robust term; logits: (B, classes), adversarial."""
