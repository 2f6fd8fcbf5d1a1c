"""Adversarial training: cross-entropy at the adversarial images (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from mwpb_fast.attacks.inner import cross_entropy
from mwpb_fast.lazy import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    """AT has no parameters."""

    def build(self) -> AT:
        return AT()


@dataclass(frozen=True)
class AT:
    """outer: mean_i CE(f(x'_i), y_i); inner: cross-entropy."""

    uses_clean = False
    inner = staticmethod(cross_entropy)

    def outer(
        self, model: torch.nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Scalar loss to descend; model in train mode."""
        return torch.nn.functional.cross_entropy(model(x_adv).float(), y)
