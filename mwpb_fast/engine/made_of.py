"""What a trace of a model writes down once and for all, so that a change of it can be noticed."""

from __future__ import annotations

import operator
import types
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from mwpb_fast.engine.fold import NORMS
from mwpb_fast.system.plain import is_plain

_MODES = ("training", "track_running_stats")  # neither says anything of eval mode, in which a twin is made
_SKIPPED = frozenset(vars(nn.Module())) | frozenset(_MODES)
_CODE = (types.FunctionType, types.MethodType)
_MISSING = object()

Key = tuple[str, str]


class MadeOf:
    """The modules of `model` and their plain attributes, numbers, text, functions, containers of them and objects
    with such attributes, by (module, attribute); a module itself by (module, "")."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = _parts(model)
        # for a look in microseconds: what each module holds by identity
        self._held = [(vars(m), len(vars(m)), list(m._modules.values()), _values(m)) for m in model.modules()]

    def differs(self, idle: set[Key]) -> set[Key]:
        """What is no longer the same, but for the attributes `idle`."""
        if all(_as_before(*held) for held in self._held):
            return set()
        return different(self.parts, _parts(self.model)) - idle

    def harmless(self, changed: set[Key]) -> bool:
        """Whether all of that are attributes which a trace shows wherever they matter: not modules, not code,
        which a trace may not reach, and not attributes of layers that a twin replaces by its own."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        layers = (nn.Conv2d, nn.Linear, *NORMS)
        code = any(isinstance(vars(modules[name]).get(key), _CODE) for name, key in changed if name in modules)
        return not code and all(key and type(modules.get(name)) not in layers for name, key in changed)

    def follow(self, graph: fx.GraphModule) -> None:
        """Let the graph read the tensors that now stand where it reads parameters, buffers and constants."""
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                place, _, attribute = node.target.rpartition(".")
                value = operator.attrgetter(node.target)(self.model)
                if value is not operator.attrgetter(node.target)(graph):
                    setattr(graph.get_submodule(place), attribute, value)


def _as_before(held: dict[str, Any], count: int, children: list[Any], values: dict[str, Any]) -> bool:
    inside = held["_modules"].values()
    return (
        len(held) == count
        and len(inside) == len(children)
        and all(map(operator.is_, inside, children))
        and all(_equal(_shown(held.get(key, _MISSING)), value) for key, value in values.items())
    )


def _parts(model: nn.Module) -> dict[Key, Any]:
    found: dict[Key, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name, ""] = module
        found |= {(name, key): value for key, value in _values(module).items()}
    return found


def _values(module: nn.Module) -> dict[str, Any]:
    own = {key: value for key, value in vars(module).items() if key not in _SKIPPED}
    return plain_values(own) | {key: _shown(value) for key, value in own.items() if _is_record(value)}


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are numbers, text, functions or containers of them, as they are now."""
    return {key: _shown(v) for key, v in values.items() if _is_known(v)}


def _is_known(value: Any) -> bool:
    return isinstance(value, _CODE) or is_plain(value)


def different(before: Mapping[Key, Any], now: Mapping[Key, Any]) -> set[Key]:
    """What is not in both, or not the same in both."""
    keys = now.keys() | before.keys()
    return {key for key in keys if not _equal(now.get(key, _MISSING), before.get(key, _MISSING))}


def _is_record(value: Any) -> bool:
    """Whether it is an object with attributes, such as options, of a class that is not PyTorch's."""
    kinds = (nn.Module, type, types.ModuleType, *_CODE)
    return hasattr(value, "__dict__") and not isinstance(value, kinds) and _is_foreign(type(value))


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "mwpb_fast", "collections")


def _shown(value: Any, depth: int = 3) -> Any:
    """The contents of a container or of an object may change in place, so they are kept as they are now."""
    if isinstance(value, (list, dict, set)):
        return repr(value)
    if depth and _is_record(value):
        inside = {key: part for key, part in vars(value).items() if _is_record(part) or _is_known(part)}
        return {key: _shown(part, depth - 1) for key, part in inside.items()}
    return value


def _equal(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))
