"""The model of an evaluation as attacks run it: its layout, its output checked, what is not finite counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mwpb_fast.engine.trial import fault
from mwpb_fast.evaluation.accuracy import sound
from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.system.layout import in_layout
from mwpb_fast.system.lazy import torch


class Called(torch.nn.Module):
    """Any function from images to logits as a module in eval mode, without weights that could be looked at."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.training = function, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Watched(torch.nn.Module):
    """The model on images in the run's layout, its logits in float32; `tick` is called before each forward pass
    and may raise. forwards: how many images have been sent through it. not_finite: of these images, how many had
    logits, and a gradient, that are not finite: (2,) int64 on the device. Raises EvaluationError for an output
    that is no (B, classes) tensor of floating logits. search: what AutoAttack searches on in its place, or None.

    Logits are finite where the largest is: a class that a model rules out by -inf is no fault.
    """

    def __init__(self, model: torch.nn.Module, layout: torch.memory_format, device: torch.device) -> None:
        super().__init__()
        self.inside, self.layout = model, layout
        self.tick: Callable[[], None] = lambda: None
        self.training, self.forwards, self.classes = False, 0, 1
        self.given: torch.dtype = torch.float32
        self.not_finite = torch.zeros(2, dtype=torch.int64, device=device)
        self.search: Any = None

    def forward(
        self, x: torch.Tensor, stand_in: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """stand_in: run in the model's place, its passes counted as the model's."""
        self.tick()
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._count_gradients)
        logits: Any = (stand_in or self.inside)(in_layout(x, self.layout))
        if reason := fault(logits, len(x), self.classes):
            raise EvaluationError(f"the model cannot be evaluated: {reason}")
        self.given, self.classes = logits.dtype, logits.shape[1]
        logits = logits.float()
        self.not_finite[0] += (~sound(logits.detach())).sum()
        return logits

    def _count_gradients(self, gradient: torch.Tensor) -> None:
        # of the sum: one pass over the images, and a sum is finite where all of its terms are
        self.not_finite[1] += (~gradient.detach().flatten(1).sum(1).isfinite()).sum()
