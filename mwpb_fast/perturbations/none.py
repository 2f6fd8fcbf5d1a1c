"""No weight perturbation."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to set."""

    def build(self) -> Nothing:
        return Nothing()


class Nothing:
    """perturb(...) -> a context manager that leaves the weights alone."""

    def __call__(self, *args: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
