"""WAT: samples weighted by exp(-alpha * margin), in the outer loss and in the attack (Zeng et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mwpb_fast.inner_losses import cross_entropy, gradient_of, kl_to_clean
from mwpb_fast.method import Inner, Notes, ObjectiveConfig
from mwpb_fast.objectives._weighted import Reweighted, base_objective
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """base: the objective whose robust term is weighted. alpha: how strongly the margin weighs; published: 0.5 on
    at, 2 on trades. beta: the base's, its own default where null; published on trades: 5."""

    base: str = "at"
    alpha: float = 0.5
    beta: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 20:
            raise ValueError(f"alpha must lie in [0, 20], not {self.alpha}")
        self.build()

    def build(self) -> WAT:
        base = base_objective(self.base, self.beta)
        if base.inner not in _LOSSES:
            raise ValueError(f"base {self.base} ascends a loss whose values are not known: it cannot be weighted")
        return WAT(base, self.alpha)


@dataclass(frozen=True)
class WAT(Reweighted):
    """outer: the base's with its robust term times c_i = exp(-alpha m'_i); inner: c_i times the base's inner loss.

    m'_i is the probability margin of the adversarial image. In both losses the gradient flows through c_i, and
    c_i is not normalised. The released code of the TRADES form leaves its attack before the first gradient step
    and its training after one batch; neither is so here.
    """

    alpha: float

    @property
    def inner(self) -> Inner:
        """The gradient of sum_i c_i l_i, l_i the base's inner loss, through c_i as well."""
        loss = _LOSSES[self.base.inner]

        def weighted(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
            z = logits.float()  # once for both factors: their gradients are added before they are rounded
            return self.weight(z, y) * loss(z, clean, y)

        return gradient_of(weighted)

    def weight(self, logits: torch.Tensor, y: torch.Tensor, notes: Notes | None = None) -> torch.Tensor:
        """exp(-alpha * margin), with its graph."""
        return torch.exp(-self.alpha * ops.margin(logits, y))


def _cross_entropy(z: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(z, y, reduction="none")


def _kl_to_clean(z: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    if clean is None:
        raise ValueError("the KL inner loss needs the logits of the natural images")
    return ops.kl_div(clean.float(), z)


# The inner losses come as gradients; the product rule wants the values of these losses too, (B,).
_LOSSES: dict[Inner, Callable[..., torch.Tensor]] = {cross_entropy: _cross_entropy, kl_to_clean: _kl_to_clean}
