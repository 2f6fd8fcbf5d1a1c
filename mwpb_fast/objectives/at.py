"""Adversarial training: cross-entropy at the adversarial images (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import ObjectiveConfig
from mwpb_fast.objectives._terms import Terms, Weighable
from mwpb_fast.system.lazy import torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """AT has no parameters."""

    def build(self) -> AT:
        return AT()


@dataclass(frozen=True)
class AT(Weighable):
    """outer: mean_i CE(f(x'_i), y_i); inner: cross-entropy."""

    inner = staticmethod(cross_entropy)

    def terms(self, model: torch.nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> Terms:
        """The robust term is the cross-entropy; there is nothing else."""
        logits = model(x_adv).float()
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return Terms(loss.new_zeros(()), loss, logits)
