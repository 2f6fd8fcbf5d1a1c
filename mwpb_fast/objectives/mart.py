"""MART: boosted cross-entropy plus misclassification-weighted KL (Wang et al. 2020), with its exact constants."""

from __future__ import annotations

from dataclasses import dataclass

from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import ObjectiveConfig
from mwpb_fast.objectives._terms import Terms, Weighable
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """beta: weight of the KL term (5 in the ResNet-18 script of MART, 6 in the WideResNet one)."""

    beta: float = 5.0

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, not {self.beta}")

    def build(self) -> MART:
        return MART(self.beta)


@dataclass(frozen=True)
class MART(Weighable):
    """outer: mean_i BCE_i + beta * mean_i KL_i * (1.0000001 - p_y(x_i)); inner: cross-entropy.

    BCE and the runner-up class are of the adversarial probabilities; KL_i = KL(p(x_i) || p(x'_i) + 1e-12);
    the gradient flows through p(x) in the KL and in its weight.
    """

    beta: float
    sends_natural = True
    inner = staticmethod(cross_entropy)

    def terms(self, model: torch.nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> Terms:
        """The robust term is the boosted cross-entropy; the rest is the weighted KL."""
        clean, adversarial = model(x).float(), model(x_adv).float()
        weight = 1.0000001 - torch.softmax(clean, dim=1).gather(1, y[:, None]).squeeze(1)
        divergence = ops.kl_div(clean, adversarial, 1e-12)
        return Terms(self.beta * (divergence * weight).mean(), ops.boosted_ce(adversarial, y), adversarial)
