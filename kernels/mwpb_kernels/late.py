"""Triton, imported when the first of its kernels is asked for: `import mwpb_kernels` never waits for it.

`triton` and `tl` are stand-ins until then. What `triton.jit` decorates is a `Kernel`; `wake` imports Triton,
decorates them in earnest, and puts what is real where the stand-ins are: a kernel sees its module's globals.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

from mwpb_kernels.native import one_line

NAMESPACES: list[dict[str, Any]] = []  # where stand-ins are
asleep = True
problem = ""  # why there is no Triton, in one line
_undecorated: list[Kernel] = []
_real: dict[Kernel | StandIn, Any] = {}  # what a stand-in stands in for
_lock = threading.RLock()


class Kernel:
    """A Triton kernel that is decorated later."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.arg_names = function, list(inspect.signature(function).parameters)
        _undecorated.append(self)
        NAMESPACES.append(function.__globals__)

    def decorated(self) -> Any:
        if wake():
            raise RuntimeError(problem)
        if self not in _real:  # it came after Triton
            _settle()
        return _real[self]

    def __getitem__(self, grid: Any) -> Any:
        return self.decorated()[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decorated(), name)


class StandIn:
    """Of a module: has what is known of it before it is there, and then all of it."""

    def __init__(self, name: str, **known: Any) -> None:
        self.__dict__.update(known, name=name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or wake():
            raise AttributeError(f"{self.name}.{name}: {problem}")
        return getattr(sys.modules[self.name], name)


triton: Any = StandIn(
    "triton", jit=Kernel, cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << max(n - 1, 0).bit_length()
)
tl: Any = StandIn("triton.language", constexpr="tl.constexpr")
_stand_ins = (triton, tl)
NAMESPACES.append(globals())


def wake() -> str:
    """Import Triton, unless that was tried. Returns why it cannot be used, in one line; "" where it can."""
    global asleep, problem
    with _lock:
        if not asleep:
            return problem
        try:
            importlib.import_module("triton.language")
        except (Exception, SystemExit) as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == "triton"
            what = f"{type(error).__name__}: {one_line(error)}"
            problem = "Triton is not installed" if absent else f"Triton does not import ({what})"
            if not absent:
                # PyTorch imports it as well: it goes on where Triton is missing, and fails where it is broken
                for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
                    del sys.modules[name]
                sys.modules["triton"] = None  # type: ignore[assignment]  # missing, from now on
        else:
            _real.update((late, sys.modules[late.name]) for late in _stand_ins)
            _settle()
        asleep = False
        return problem


def _settle() -> None:
    """Decorate the kernels that wait for it, and put what is real where the stand-ins are."""
    with _lock:
        while _undecorated:
            kernel = _undecorated.pop()
            _real[kernel] = _real[_stand_ins[0]].jit(kernel.function)
        for namespace in NAMESPACES:
            for name, value in list(namespace.items()):
                if isinstance(value, (Kernel, StandIn)) and value in _real:
                    namespace[name] = _real[value]


def _there() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ModuleNotFoundError:
        return False
    except (Exception, SystemExit):  # `wake` will tell
        return True


HAS_TRITON = _there()  # it may be broken nevertheless
if not HAS_TRITON:
    wake()
