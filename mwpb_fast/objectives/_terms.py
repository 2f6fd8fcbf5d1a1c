"""Objectives whose loss can be taken apart, so that another may weigh its samples."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

from mwpb_fast.method import Notes, Objective
from mwpb_fast.system.lazy import torch


class Terms(NamedTuple):
    """loss = rest + mean_i weighted_i.

    rest: scalar, what is never re-weighted. weighted: (B,), the robust term of each sample. logits: (B, classes)
    float32, of the adversarial images, with their graph.
    """

    rest: torch.Tensor
    weighted: torch.Tensor
    logits: torch.Tensor

    def loss(self) -> torch.Tensor:
        """The plain objective's scalar."""
        return self.rest + self.weighted.mean()


@runtime_checkable
class Weighable(Objective, Protocol):
    """An objective whose outer loss is the sum of its terms."""

    @abstractmethod
    def terms(self, model: torch.nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> Terms:
        """Arguments as outer's."""

    def outer(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        x_adv: torch.Tensor,
        y: torch.Tensor,
        notes: Notes | None = None,
    ) -> torch.Tensor:
        """Scalar loss to descend; model in train mode."""
        return self.terms(model, x, x_adv, y).loss()
