"""What a model's code is, as a hash: a change of it that no probe image shows must not pass for the old function.

Code is followed from the model's classes and functions to what it names in its own module and holds in closures:
functions, plain values, tensors, and modules. PyTorch and this package are left out, which have versions.
"""

from __future__ import annotations

import functools
import hashlib
import types
from typing import Any

from mwpb_fast.evaluation.model_checks import hash_attributes, hash_model, tensor_bytes
from mwpb_fast.system.lazy import torch
from mwpb_fast.system.plain import is_plain

VERSIONED = ("torch", "mwpb_fast", "mwpb_kernels", "builtins")


def hash_code(model: torch.nn.Module) -> str:
    """SHA-256 of the code that a model is made of; "" where all of it has a version."""
    walk = _Walk(model)
    for module in model.modules():
        walk.add_class(type(module))
        for value in vars(module).values():
            if callable(value) and not isinstance(value, torch.nn.Module):
                walk.add(value)
    return walk.digest.hexdigest() if walk.found else ""


class _Walk:
    def __init__(self, model: torch.nn.Module) -> None:
        self.digest, self.found = hashlib.sha256(), False
        self.seen = {id(module) for module in model.modules()}
        self.kept: list[Any] = []  # so that no id is given away while it is remembered

    def add(self, value: Any) -> None:
        if is_plain(value):
            self._say(_ordered(value))
        elif isinstance(value, type):
            self.add_class(value)
        else:
            self._add_once(value)

    def _add_once(self, value: Any) -> None:
        if id(value) in self.seen:
            return
        self.seen.add(id(value))
        self.kept.append(value)
        if isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, torch.nn.Module):
            self._say("module", hash_model(value), hash_attributes(value), hash_code(value))
        elif isinstance(value, torch.Tensor):
            self._say("tensor", value.dtype, tuple(value.shape), tensor_bytes(value))
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.add(part)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif _foreign(type(value)) and callable(value):
            self.add_class(type(value))
            for part in vars(value).values() if hasattr(value, "__dict__") else ():
                self.add(part)

    def add_class(self, kind: type) -> None:
        for one in filter(_foreign, kind.__mro__):
            if id(one) not in self.seen:
                self.seen.add(id(one))
                self.kept.append(one)
                for name, value in sorted(vars(one).items(), key=lambda item: item[0]):
                    function = getattr(value, "__func__", getattr(value, "fget", value))
                    own = is_plain(value) and not name.startswith("__")
                    if own or isinstance(function, types.FunctionType):
                        self._say(name)
                        self.add(function)

    def _add_function(self, function: types.FunctionType) -> None:
        if _foreign(function):
            self.found = True
            self._add_code(function.__code__)
            for value in function.__defaults__ or ():
                self.add(value)
            for name in _names(function.__code__):
                value = function.__globals__.get(name)
                if not (callable(value) and _root(value) != _root(function)):  # other packages are not searched
                    self.add(value)
        self._held(function)

    def _held(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # nothing is in it yet
                continue

    def _add_code(self, code: types.CodeType) -> None:
        self._say(code.co_code, code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            else:
                self._say(_ordered(constant))

    def _say(self, *what: Any) -> None:
        self.digest.update(repr(what).encode())


def _names(code: types.CodeType) -> list[str]:
    inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in _names(one)]
    return [*code.co_names, *inner]


def _ordered(value: Any) -> Any:
    """A set has another order in each process."""
    return sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value


def _root(what: Any) -> str:
    return str(getattr(what, "__module__", None) or type(what).__module__).partition(".")[0]


def _foreign(what: Any) -> bool:
    return _root(what) not in VERSIONED
