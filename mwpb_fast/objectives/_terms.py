"""An outer loss taken apart, so that another objective may weigh its samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


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
