"""The model of an evaluation as attacks run it: its layout, its output checked, what is not finite counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from mwpb_fast.engine.trial import fault
from mwpb_fast.evaluation.accuracy import sound
from mwpb_fast.evaluation.course import Course
from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.system.layout import in_layout
from mwpb_fast.system.lazy import torch
from mwpb_fast.system.memory import none_left

T = TypeVar("T")


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
    that is no (B, classes) tensor of floating logits. at_once: at most so many images go through the model
    together, a batch of more in parts that keep nothing for the backward pass, which runs them again; 0: any
    number. search: what AutoAttack searches on in its place, or None. course: how far the attack at work is.

    Logits are finite where the largest is: a class that a model rules out by -inf is no fault.
    """

    def __init__(self, model: torch.nn.Module, layout: torch.memory_format, device: torch.device) -> None:
        super().__init__()
        self.inside, self.layout = model, layout
        self.tick: Callable[[], None] = lambda: None
        self.training, self.forwards, self.classes = False, 0, 1
        self.at_once = self.last = 0
        self.given: torch.dtype = torch.float32
        self.not_finite = torch.zeros(2, dtype=torch.int64, device=device)
        self.search: Any = None
        self.course = Course(0.0)

    def begin(self, part: str, each: int, left: float) -> None:
        """A part of an attack begins, see `Course`."""
        self.course.begin(self.forwards, part, each, left)

    def forward(
        self, x: torch.Tensor, stand_in: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """stand_in: run in the model's place, its passes counted as the model's."""
        self.tick()
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._count_gradients)
        self.last, inside = min(len(x), self.at_once or len(x)), stand_in or self.inside
        if self.last == len(x):
            logits = self._checked(inside(in_layout(x, self.layout)), x)
        else:
            logits = torch.cat([self._again(part, inside) for part in x.split(self.at_once)])
        self.not_finite[0] += (~sound(logits.detach())).sum()
        return logits

    def with_room(self, call: Callable[[], T]) -> T:
        """call(), done again with half as many images at once, as often as it takes, where no memory is left; a
        line on stderr says so each time. Raises what it raises where a single image is too many."""
        while True:
            try:
                return call()
            except (MemoryError, RuntimeError) as error:
                if not none_left(error) or self.last <= 1:
                    raise
            # here the failed pass, which the error held on to, is gone
            self.at_once = self.last // 2
            if self.search is not None:
                self.search.close()
            if self.not_finite.is_cuda:
                torch.cuda.empty_cache()
            print(
                f"mwpb-fast: no memory left for {self.last} images at once; on with {self.at_once}",
                file=sys.stderr,
            )

    def _again(self, x: torch.Tensor, inside: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        def run(x: torch.Tensor) -> torch.Tensor:
            return self._checked(inside(in_layout(x, self.layout)), x)

        if not (x.requires_grad and torch.is_grad_enabled()):
            return run(x)
        from torch.utils.checkpoint import checkpoint

        logits: torch.Tensor = checkpoint(run, x, use_reentrant=False)
        return logits

    def _checked(self, logits: Any, x: torch.Tensor) -> torch.Tensor:
        if reason := fault(logits, len(x), self.classes):
            raise EvaluationError(f"the model cannot be evaluated: {reason}")
        self.given, self.classes = logits.dtype, logits.shape[1]
        found: torch.Tensor = logits.float()
        return found

    def _count_gradients(self, gradient: torch.Tensor) -> None:
        # of the sum: one pass over the images, and a sum is finite where all of its terms are
        self.not_finite[1] += (~gradient.detach().flatten(1).sum(1).isfinite()).sum()
