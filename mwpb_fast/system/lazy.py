"""Heavy packages, imported at first use.

The configuration classes live beside the code that they configure, and the command line must refuse a bad
option before anything heavy is imported. Modules that carry configuration take `torch` and `ops` from here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self._name)
        value = getattr(module, attribute)
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import mwpb_kernels as ops
    import torch
else:
    torch = _Lazy("torch")
    ops = _Lazy("mwpb_kernels")

__all__ = ["ops", "torch"]
