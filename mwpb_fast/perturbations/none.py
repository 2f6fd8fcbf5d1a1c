"""No weight perturbation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mwpb_fast.method import Perturbation, PerturbationConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Config(PerturbationConfig):
    """Nothing to set."""

    def build(self) -> Nothing:
        return Nothing()


@dataclass(frozen=True)
class Nothing(Perturbation):
    """perturb(model, loss) -> a context manager that leaves the weights alone."""

    def __call__(
        self, model: torch.nn.Module, loss: Callable[[], torch.Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
