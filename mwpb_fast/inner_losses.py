"""Inner losses of an attack, as the gradient of their sum over the batch with respect to the logits.

An inner loss is called as inner(logits, clean, y) -> dlogits, with the logits at the current iterate, the
logits of the natural images (None where no loss asks for them) and the labels. The sum keeps a 1/B factor from
underflowing in half precision; the sign step does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable

from mwpb_fast.method import Inner
from mwpb_fast.system.lazy import ops, torch


def cross_entropy(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """AT, MART and AWP: ascend the cross-entropy."""
    return ops.ce_grad(logits, y)


def kl_to_clean(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """TRADES: ascend KL(p(x) || p(x')), the natural distribution fixed."""
    if clean is None:
        raise ValueError("the KL inner loss needs the logits of the natural images")
    return ops.kl_grad(logits, clean)


def carlini_wagner(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """CW: ascend -max(z_y - max_{j != y} z_j + 50, 0) (Carlini and Wagner 2017, as Madry's code has it)."""
    return ops.cw_grad(logits, y, 50.0)


def dlr(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio of APGD (Croce and Hein 2020), at least 3 classes."""
    return ops.dlr_grad(logits, y)


def gradient_of(loss: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]) -> Inner:
    """An inner loss from any differentiable loss(logits, clean, y); a result of shape (B,) is summed."""

    def inner(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf, clean, y).sum(), leaf)
        return gradient

    return inner
