"""ST-AT: squeeze the most different predictions in each ball together (Li et al., "Squeeze training for
adversarial robustness", ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mwpb_fast.attacks.squeeze import pick, select
from mwpb_fast.inner_losses import kl_to_clean
from mwpb_fast.method import Notes, Objective, ObjectiveConfig
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    """beta: weight of the squeeze. The authors' script demands a value and has none for CIFAR-10; 6 is what their
    semi-supervised script is called with. Needs attack squeeze."""

    beta: float = 6.0
    needs: ClassVar[frozenset[str]] = frozenset({"second"})

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, not {self.beta}")

    def build(self) -> ST:
        return ST(self.beta)


@dataclass(frozen=True)
class ST(Objective):
    """outer: mean CE(x_i) + beta * mean_i symKL(upper_i, lower_i), both of x, x_c and x_a, chosen once more.

    symKL = 1/2 [KL(sg(P_lower) || P_upper) + KL(sg(P_upper) || P_lower)], sg: no gradient flows through. x_c goes
    through the model first, with running statistics left alone; then x and x_a, which move them, as in the
    authors' code.

    Speed: three outer passes; bf16 applies, and a CUDA graph can hold it.
    """

    beta: float
    sends_natural = True
    inner = staticmethod(kl_to_clean)  # between the two chosen points: P - P_other, twice symKL's gradient

    def outer(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        x_adv: torch.Tensor,
        y: torch.Tensor,
        notes: Notes | None = None,
    ) -> torch.Tensor:
        """Scalar loss to descend; model in train mode. notes: "second", the other point, like x."""
        from mwpb_fast.engine.net import untracked

        if notes is None or "second" not in notes:
            raise ValueError("ST's loss needs what attack squeeze notes as 'second'")
        with untracked(model):
            second = model(notes["second"]).float()
        logits = [model(x).float(), second, model(x_adv).float()]
        upper, lower = (pick(logits, choice) for choice in select(logits, y))
        squeeze = ops.kl_div(lower.detach(), upper) + ops.kl_div(upper.detach(), lower)
        return torch.nn.functional.cross_entropy(logits[0], y) + self.beta * squeeze.mean() / 2
