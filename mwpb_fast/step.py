"""One training step: Algorithm 1 of the MWPB paper.

The step is handed a budget, an attack, an objective and a weight perturbation, and imports none of them. It
has no branch on a tensor's value and never waits for the device: a loss or gradient that is not finite is kept
from the weights on the device itself, and counted there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mwpb_fast.engine.net import Net, crafting
from mwpb_fast.engine.onednn_fault import protect
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.rollback import Guard
from mwpb_fast.optim import Average


class StepResult(NamedTuple):
    """loss: scalar. radius: (B,), of the balls. finite: scalar boolean; False where the step left the weights
    alone."""

    loss: torch.Tensor
    radius: torch.Tensor
    finite: torch.Tensor


@dataclass
class Step:
    """step(x, y, index, key, budget) trains `model` on one batch, and `average`, if any, follows it."""

    model: torch.nn.Module
    net: Net
    attack: Callable[..., torch.Tensor]
    objective: Any
    perturb: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    precision: Precision
    attack_mode: str = "eval"
    average: Average | None = None

    def __post_init__(self) -> None:
        protect(self.model)
        self.scaler = self.precision.scaler()
        self.statistics = Guard(b for b in self.model.buffers() if b.is_floating_point())
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, key: torch.Tensor, budget: Any
    ) -> StepResult:
        """x: (B, C, H, W) float32 in [0, 1]. y, index: (B,) int64. key: one-element int64 tensor, the seed of
        the attack's noise. budget: from logits and labels to radii."""
        result = self.compute(x, y, index, key, budget)
        self.count()
        return result

    def compute(
        self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, key: torch.Tensor, budget: Any
    ) -> StepResult:
        """The step's work on the device, which can be captured in a graph and replayed."""
        model, objective = self.model, self.objective
        x = x.contiguous(memory_format=self.precision.memory_format)
        notes: dict[str, torch.Tensor] = {}

        def outer() -> torch.Tensor:
            with self.precision.autocast():
                return objective.outer(model, x, x_adv, y, notes)

        self.net.refresh()
        with crafting(model, self.attack_mode):
            clean = self.net.logits(x) if budget.uses_logits or objective.uses_clean else None
            radius = budget(clean, y)
            x_adv = self.attack(self.net, x, y, clean, radius, objective.inner, key, index, notes)

        model.train()
        self.statistics.save()
        with self.perturb(model, outer):
            loss = outer()
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            finite = self.update(loss)
        self.statistics.put_back(finite)
        if self.average is not None:
            self.average.update()
        return StepResult(loss.detach(), notes.get("radius", radius), finite)

    def count(self) -> None:
        """The host's part of a step."""
        if self.average is not None:
            self.average.count()

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that outlives a step and is changed by it, by name."""
        found = {f"model.{k}": v for k, v in _tensors(self.model)}
        for i, parameter in enumerate(self.parameters):
            kept = self.optimizer.state.get(parameter, {}).items()
            found |= {f"optimizer.{i}.{k}": v for k, v in kept if isinstance(v, torch.Tensor)}
        if self.average is not None:
            found |= {f"average.{k}": v for k, v in _tensors(self.average.module)}
        for name in ("attack", "objective", "perturb"):
            memory = getattr(getattr(self, name), "memory", {})
            found |= {f"{name}.{k}": v for k, v in memory.items()}
        return found

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        """The optimiser's step, left out on the device where loss or gradient is not finite; returns finite.

        fp16 gradients may overflow in the ordinary course of loss scaling: there the scaler leaves the step out.
        """
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return torch.isfinite(loss.detach())
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        # the protocol by which torch.amp's own scaler tells a fused optimiser to leave a step out
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return finite


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
