"""What a model's code is, as a hash: a change of it that no probe image shows must not pass for the old function.

Code is followed from the model's classes and functions to what they name and hold: functions, values, objects of
the user's own classes, and what they name in modules of the user's own. PyTorch, this package, Python's library
and installed packages have versions: of what is called in these its name counts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mwpb_fast.evaluation.model_checks import hash_attributes, hash_model, tensor_bytes
from mwpb_fast.system.lazy import torch
from mwpb_fast.system.plain import is_plain, ordered

VERSIONED = ("torch", "mwpb_fast", "mwpb_kernels", "builtins")
INSTALLED = {"site-packages", "dist-packages"}
WEIGHTS = {"_parameters", "_buffers", "_modules"}


def hash_code(model: torch.nn.Module) -> str:
    """SHA-256 of the code that a model is made of; "" where all of it has a version."""
    walk = _Walk()
    walk.add_model(model)
    return walk.digest.hexdigest() if walk.found else ""


class _Walk:
    def __init__(self) -> None:
        self.digest, self.found = hashlib.sha256(), False
        self.seen: set[int] = set()
        self.kept: list[Any] = []  # so that no id is given away while it is remembered

    def add(self, value: Any) -> None:
        if is_plain(value):
            self._say(ordered(value))
        elif isinstance(value, type):
            self._say(_title(value))
            self.add_class(value)
        elif self._is_new(value):
            self._add_new(value)

    def _is_new(self, value: Any) -> bool:
        if id(value) in self.seen:
            return False
        self.seen.add(id(value))
        self.kept.append(value)
        return True

    def _add_new(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, torch.nn.Module):
            self._say("module", hash_model(value), hash_attributes(value))
            self.add_model(value)
        elif isinstance(value, torch.Tensor):
            self._say("tensor", value.dtype, tuple(value.shape), tensor_bytes(value))
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            self.found = True
            for part in (value.func, value.args, value.keywords):
                self.add(part)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, types.ModuleType):
            if _own(value):
                self._add_members(vars(value))
        elif isinstance(value, (dict, types.MappingProxyType)):
            for key, part in value.items():
                self.add(key)
                self.add(part)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for part in sorted(value, key=_said) if isinstance(value, (set, frozenset)) else value:
                self.add(part)
        else:
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        if _own(type(value)) or (_foreign(type(value)) and callable(value)):
            self.found = True
            self.add_class(type(value))
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            state = {name: getattr(value, name) for name in slots if hasattr(value, name)}
            self._add_members(state | getattr(value, "__dict__", {}), dunder=True)
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            self._say("array", value.dtype.str, value.shape, value.tobytes())
        else:
            self._say(_said(value))

    def _add_members(self, members: dict[str, Any], dunder: bool = False) -> None:
        for name, value in sorted(members.items()):
            if dunder or not name.startswith("__"):
                self._say(name)
                self.add(value)

    def add_model(self, model: torch.nn.Module) -> None:
        """What its weights and plain attributes, which have hashes of their own, do not say."""
        modules = list(model.modules())
        new = [module for module in modules if self._is_new(module) or module is model]
        for module in new:
            self.add_class(type(module))
            if isinstance(module, torch.jit.ScriptModule):
                self.found = True
                code, constants = getattr(module, "code_with_constants", ("", None))
                self._say(code)
                self.add(getattr(constants, "const_mapping", None))
            for name, value in sorted(vars(module).items()):
                if name not in WEIGHTS and not is_plain(value) and not isinstance(value, torch.Tensor):
                    # the keys of hooks are numbers that no two processes have to give alike
                    hooks = isinstance(value, dict) and name.endswith("_hooks")
                    for one in value.values() if hooks else (name, value):
                        self.add(one)

    def add_class(self, kind: type) -> None:
        for one in filter(_foreign, kind.__mro__):
            if self._is_new(one):
                for name, value in sorted(vars(one).items(), key=lambda item: item[0]):
                    function = _function_of(value)
                    if not name.startswith("__") or isinstance(function, types.FunctionType):
                        self._say(name)
                        self.add(function)

    def _add_function(self, function: types.FunctionType) -> None:
        if _foreign(function):
            self.found = True
            self._add_code(function.__code__)
            self.add(function.__defaults__)
            self.add(function.__kwdefaults__)
            self.add(vars(function))
            self._add_named(function.__globals__, _names(function.__code__), function)
        else:
            self._say(_title(function))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # nothing is in it yet
                self.add(cell.cell_contents)

    def _add_named(self, within: dict[str, Any], names: set[str], function: types.FunctionType) -> None:
        """Of a function's globals, and of the modules among them that are the user's own, what its code names."""
        package = str(function.__globals__.get("__package__"))
        met, left = {id(within)}, [within]
        while left:
            members = left.pop()
            for name in sorted(names):
                value = members.get(name)
                if value is None and members is within:  # imported inside of the function
                    value = sys.modules.get(name) or sys.modules.get(f"{package}.{name}")
                    value = value if _own(value) else None
                if isinstance(value, types.ModuleType):
                    if _own(value) and id(value.__dict__) not in met:
                        met.add(id(value.__dict__))
                        left.append(value.__dict__)
                elif callable(value) and not (_holds(value) or _own(value) or _root(value) == _root(function)):
                    self._say(_title(value))  # other packages are not searched
                elif name in members:
                    self._say(name)
                    self.add(value)

    def _add_code(self, code: types.CodeType) -> None:
        self._say(code.co_code, code.co_names, code.co_varnames, code.co_exceptiontable)
        self._say(code.co_argcount, code.co_kwonlyargcount, code.co_flags)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            else:
                self._say(ordered(constant))

    def _say(self, *what: Any) -> None:
        self.digest.update(repr(what).encode())


def _names(code: types.CodeType) -> set[str]:
    """What it may mean by a name: getattr's, too."""
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    inner: Iterable[set[str]] = (_names(one) for one in code.co_consts if isinstance(one, types.CodeType))
    return texts.union(code.co_names, *inner)


def _function_of(value: Any) -> Any:
    """The function behind a method, a property or a cached property of a class."""
    for name in ("__func__", "fget", "func"):
        if isinstance(found := getattr(value, name, None), types.FunctionType):
            return value if isinstance(value, functools.partial | functools.partialmethod) else found
    return value


def _holds(value: Any) -> bool:
    """Whether it is of PyTorch or Python, and made of what the user gave it."""
    return isinstance(value, (torch.nn.Module, functools.partial, types.MethodType))


def _said(value: Any) -> str:
    """What a thing without code says of itself, if it says more than where it lies."""
    if callable(value):
        return str(_title(value))
    with contextlib.suppress(Exception):
        if " at 0x" not in (text := repr(value)):
            return text
    return str(_title(type(value)))


def _title(what: Any) -> tuple[str, str]:
    return str(getattr(what, "__module__", None)), str(getattr(what, "__qualname__", type(what).__qualname__))


def _module(what: Any) -> str:
    if isinstance(what, types.ModuleType):
        return what.__name__
    return str(getattr(what, "__module__", None) or type(what).__module__)


def _root(what: Any) -> str:
    return _module(what).partition(".")[0]


def _foreign(what: Any) -> bool:
    return _root(what) not in VERSIONED


def _own(what: Any) -> bool:
    """Whether it is the user's own: not of Python, nor of what is installed."""
    file = getattr(sys.modules.get(_module(what)), "__file__", None)
    if not file:
        return _foreign(what) and _root(what) not in sys.stdlib_module_names
    return _foreign(what) and not _is_installed(file)


@functools.cache
def _is_installed(file: str) -> bool:
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    path = Path(file)
    return bool(INSTALLED.intersection(path.parts)) or any(path.is_relative_to(one) for one in libraries)
