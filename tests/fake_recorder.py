"""A stream of operations in place of a CUDA graph: records operator calls, and repeats them on the same memory.

Like a graph it knows nothing of Python: a number that a function computes on the host stays what it was when the
function was recorded, and so does every tensor's place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mwpb_fast.engine.recorder import tensors


def writes(func: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def gives_views(func: Any) -> bool:
    return all(r.alias_info is not None for r in func._schema.returns)


def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that a call writes; a batch norm's running statistics are not marked in its schema."""
    names = [a.name for a in func._schema.arguments]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    marked = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    marked += [name for name in ("running_mean", "running_var") if name in names and "backward" not in func.name()]
    return [t for name in marked for t in tensors(named.get(name))]


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by storage: the bytes before a write
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for t in written(func, args, kwargs):
            place = t.untyped_storage().data_ptr()
            if place not in self.made and place not in self.before:
                memory = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
                self.before[place] = (memory, memory.clone())
        result = func(*args, **kwargs)
        if not writes(func) and not gives_views(func):
            self.made |= {t.untyped_storage().data_ptr() for t in tensors(result)}
        self.calls.append((func, args, kwargs, result))  # keeps every tensor, so that no memory is used twice
        return result


class FakeRecorder:
    """recorder.Recorder on the CPU."""

    alive = 0

    def __init__(self, device: torch.device) -> None:
        self.log: _Log | None = None
        self.warm_ups = self.replays = 0
        FakeRecorder.alive += 1

    def warm_up(self, function: Callable[[], object]) -> None:
        self.warm_ups += 1
        function()

    def capture(self, function: Callable[[], object]) -> None:
        with _Log() as self.log:
            function()
        with torch.no_grad():
            for memory, bytes_before in self.log.before.values():
                memory.copy_(bytes_before)  # a recording does nothing yet

    @torch.no_grad()
    def replay(self) -> None:
        assert self.log is not None
        self.replays += 1
        for func, args, kwargs, kept in self.log.calls:
            if func.namespace == "profiler" or (gives_views(func) and not writes(func) and kept is not None):
                continue
            again = func(*args, **kwargs)
            for mine, new in zip(tensors(kept), tensors(again), strict=True):
                if mine.data_ptr() != new.data_ptr():  # also what an operation gives besides writing
                    mine.copy_(new)

    def close(self) -> None:
        self.log = None
        FakeRecorder.alive -= 1
