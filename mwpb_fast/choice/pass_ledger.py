"""The ledger of a training pass: its loss, gradient and running statistics against the model's in full float32.

A pass may be as far from them as twice the plain one is, whose roundings are the run's own, and a little more, for
sums in another order.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F

from mwpb_fast.choice.ledger import as_reference, looked_at
from mwpb_fast.engine.net import module_mode
from mwpb_fast.engine.precision import Precision
from mwpb_fast.method import Batch

TIMES, SLACK = 2.0, 1e-3
PARTS = ("loss", "gradient", "statistics")


class PassLedger:
    """row(trained) on some images of `batch` under the model's weights of now; they are left as they are, and its
    buffers too. precision: of training."""

    def __init__(self, model: torch.nn.Module, precision: Precision, batch: Batch) -> None:
        count = looked_at(model, batch.x, precision.device)
        self.x, self.y = batch.x[:count], batch.y[:count]
        self.model, self.precision = model, precision

    def row(self, trained: torch.nn.Module) -> dict[str, float]:
        """Distances from the reference, of its norm, of `trained` and of the plain pass; `breach` judges them."""
        found = self.run(trained, self.precision)
        own = {part: _apart(found[part], self._reference[part]) for part in PARTS}
        return own | {f"{part}_of_plain": _apart(self._plain[part], self._reference[part]) for part in PARTS}

    def run(self, trained: torch.nn.Module, precision: Precision) -> dict[str, torch.Tensor]:
        """What the pass gives, by part."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        before = [(b, b.clone()) for b in self.model.buffers()]
        device = precision.device
        try:
            with module_mode(self.model, training=True), torch.random.fork_rng([device] if self.x.is_cuda else []):
                torch.manual_seed(0)  # what drops units drops the same ones in all passes
                with torch.enable_grad(), precision.autocast():
                    loss = F.cross_entropy(trained(self.x).float(), self.y)
                gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
            return {
                "loss": loss.detach().reshape(1),
                "gradient": torch.cat([g.flatten() for g in gradient if g is not None]),
                "statistics": torch.cat([b.flatten() for b in buffers]) if buffers else loss.new_zeros(1),
            }
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)

    @cached_property
    def _plain(self) -> dict[str, torch.Tensor]:
        return self.run(self.model, self.precision)

    @cached_property
    def _reference(self) -> dict[str, torch.Tensor]:
        own = self.precision
        with as_reference():
            return self.run(self.model, Precision(own.device, torch.float32, own.memory_format, oracle=False))


def breach(row: dict[str, float]) -> str:
    """In what a row is too far off; empty where it is in nothing. What is no number is too far."""
    for part in PARTS:
        if not row[part] <= TIMES * row[f"{part}_of_plain"] + SLACK:
            off, plain = row[part], row[f"{part}_of_plain"]
            return f"{part} of the training pass {off:.2g} off full float32's, the plain one's {plain:.2g}"
    return ""


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm
    return (norm(one.double() - other.double()) / norm(other.double()).clamp_min(1e-30)).item()
