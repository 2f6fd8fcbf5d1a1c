"""TRADES: natural cross-entropy plus beta times the KL from natural to adversarial (Zhang et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from mwpb_fast.inner_losses import kl_to_clean
from mwpb_fast.method import ObjectiveConfig
from mwpb_fast.objectives._terms import Terms, Weighable
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """beta: weight of the KL term."""

    beta: float = 6.0

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, not {self.beta}")

    def build(self) -> TRADES:
        return TRADES(self.beta)


@dataclass(frozen=True)
class TRADES(Weighable):
    """outer: mean CE(f(x), y) + beta * mean_i KL(p(x_i) || p(x'_i)), the target not detached; inner: KL.

    The natural and the adversarial images go through the model in two passes, so that each has its own batch
    statistics, as in the released code.
    """

    beta: float
    uses_clean = True
    sends_natural = True
    inner = staticmethod(kl_to_clean)

    def terms(self, model: torch.nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> Terms:
        """The robust term is beta times the KL; the rest is the natural cross-entropy."""
        clean, adversarial = model(x).float(), model(x_adv).float()
        natural = torch.nn.functional.cross_entropy(clean, y)
        return Terms(natural, self.beta * ops.kl_div(clean, adversarial), adversarial)
