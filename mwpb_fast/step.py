"""One training step: Algorithm 1 of the MWPB paper.

The step is handed a method, which is a budget, an attack, an objective and a weight perturbation, and imports
none of them. It has no branch on a tensor's value and never waits for the device: a loss or gradient that is not
finite is kept from the weights on the device itself, and counted there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mwpb_fast.engine.net import crafting
from mwpb_fast.engine.onednn_fault import protect
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.rollback import Rollback
from mwpb_fast.method import Batch, Method, Net, Notes
from mwpb_fast.optim import Average, heeds_found_inf
from mwpb_fast.system import ranks


class StepResult(NamedTuple):
    """Of the whole batch, also where several processes have a part of it each.

    loss: scalar. radius: (B,), of the balls. finite: scalar boolean; False where the step left the weights
    alone. norm: scalar, of the whole gradient before it was clipped; NaN where it was not asked for, which is
    with loss scaling and without clipping."""

    loss: torch.Tensor
    radius: torch.Tensor
    finite: torch.Tensor
    norm: torch.Tensor


@dataclass
class Step:
    """step(batch, key, method) trains `model` on one batch, and `average`, if any, follows it.

    natural_pass, clip_norm: as `mwpb_fast.config.Config` and `OptimConfig` have them. merge_statistics: each rank
    moves running statistics of its own, and they become their mean. trained: what the training pass runs, with the
    model's own parameters and buffers; the model itself by default. Raises ValueError for an optimizer that has to
    leave steps out, as there is no scaler, and cannot.
    """

    model: torch.nn.Module
    net: Net
    optimizer: torch.optim.Optimizer
    precision: Precision
    attack_mode: str = "eval"
    natural_pass: bool = False
    clip_norm: float = 0.0
    average: Average | None = None
    merge_statistics: bool = False
    trained: torch.nn.Module | None = None

    def __post_init__(self) -> None:
        protect(self.model)
        self.scaler = self.precision.scaler()
        if not self.scaler.is_enabled() and not heeds_found_inf(self.optimizer):
            raise ValueError(
                f"the optimizer {type(self.optimizer).__name__} cannot leave a step out where the gradient is not "
                "finite: make it with fused=True, where it has that, or as mwpb_fast.optim.make_optimizer does"
            )
        self.buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        self.statistics = Rollback(self.buffers)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self, batch: Batch, key: torch.Tensor, method: Method) -> StepResult:
        """key: one-element int64 tensor, the seed of the attack's noise."""
        result = self.compute(batch, key, method)
        self.count()
        return result

    def compute(self, batch: Batch, key: torch.Tensor, method: Method) -> StepResult:
        """The step's work on the device, which can be captured in a graph and replayed."""
        model, (x, y, index) = self.model, batch
        trained = self.model if self.trained is None else self.trained
        x = x.contiguous(memory_format=self.precision.memory_format)
        notes: Notes = {}

        def outer() -> torch.Tensor:
            with self.precision.autocast():
                return method.objective.outer(trained, x, x_adv, y, notes)

        self.net.refresh()
        with crafting(model, self.attack_mode):
            clean: Any = self.net.logits(x) if method.uses_clean else None  # then nothing looks at it
            radius = method.budget(clean, y)
            x_adv = method.attack(self.net, Batch(x, y, index), clean, radius, method.objective.inner, key, notes)

        model.train()
        self.statistics.save()
        if self.natural_pass:  # before the weights are perturbed, so that the statistics are those of the model
            with torch.no_grad(), self.precision.autocast():
                trained(x)
        with method.perturb(model, outer):
            loss = outer()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            loss = ranks.mean(loss.detach())
            finite, norm = self.update(loss)
        if self.merge_statistics:
            ranks.mean_(self.buffers)
        self.statistics.put_back(finite)
        self.exchange(index, method)
        if self.average is not None:
            self.average.update()
        return StepResult(loss.detach(), ranks.whole(notes.get("radius", radius)), finite, norm)

    def exchange(self, index: torch.Tensor, method: Method) -> None:
        """What the axes now remember of the whole batch's images, on every rank. index: (B,), of this rank's."""
        if ranks.count() > 1:
            everyone = ranks.whole(index)
            for memory in method.memory.values():
                for rows in memory.values():
                    rows[everyone] = ranks.whole(rows[index])

    def count(self) -> None:
        """The host's part of a step."""
        if self.average is not None:
            self.average.count()

    def state(self, method: Method) -> dict[str, torch.Tensor]:
        """Every tensor that outlives a step and is changed by it, by name."""
        found = {f"model.{k}": v for k, v in _tensors(self.model)}
        for i, parameter in enumerate(self.parameters):
            kept = self.optimizer.state.get(parameter, {}).items()
            found |= {f"optimizer.{i}.{k}": v for k, v in kept if isinstance(v, torch.Tensor)}
        if self.average is not None:
            found |= {f"average.{k}": v for k, v in _tensors(self.average.module)}
        for name, memory in method.memory.items():
            found |= {f"{name}.{k}": v for k, v in memory.items()}
        return found

    def update(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The optimiser's step, left out on the device where loss or gradient is not finite; returns finite and
        the gradient's norm.

        fp16 gradients may overflow in the ordinary course of loss scaling: there the scaler leaves the step out.
        """
        if self.scaler.is_enabled():
            norm = torch.full_like(loss.detach(), torch.nan)
            if self.clip_norm:
                self.scaler.unscale_(self.optimizer)
                norm = self.clipped()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return torch.isfinite(loss.detach()), norm
        norm = self.clipped()
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        # the protocol by which torch.amp's own scaler tells a fused optimiser to leave a step out
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return finite, norm

    def clipped(self) -> torch.Tensor:
        """The norm of the whole gradient, which is then shortened to clip_norm where it is longer."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return norm


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
