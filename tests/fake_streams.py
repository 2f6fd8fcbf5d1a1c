"""CUDA's streams on the CPU, for tests: what is done on one is done at once, and races are told of.

An operation that reads what was written on another stream, or writes what was read or written there, must come
after a wait for that; so must one that may be given memory which the other stream used until it was freed, because
the memory of a stream is given out anew in the order of that stream alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fake_recorder import gives_views, writes, written
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mwpb_fast.engine.recorder import tensors


@dataclass(eq=False)
class Stream:
    """done: operations. seen: of each stream, how many of its operations are over before the next one here."""

    name: str
    done: int = 0
    seen: dict[Stream, int] = field(default_factory=dict)

    def wait_stream(self, other: Stream) -> None:
        for stream, number in [*other.seen.items(), (other, other.done)]:
            self.seen[stream] = max(self.seen.get(stream, 0), number)

    def knows(self, stream: Stream, number: int) -> bool:
        return stream is self or self.seen.get(stream, 0) >= number


@dataclass(eq=False)
class Memory:
    """home: the stream on which it was given out. wrote, read: the last operation on each stream."""

    alive: StorageWeakRef
    home: Stream
    wrote: dict[Stream, int] = field(default_factory=dict)
    read: dict[Stream, int] = field(default_factory=dict)


class Streams(TorchDispatchMode):
    """Inside the block operations are watched. races: those that were found."""

    def __init__(self) -> None:
        super().__init__()
        self.current = [Stream("main")]
        self.known: dict[int, Memory] = {}
        self.freed: list[Memory] = []
        self.races: list[str] = []

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, here = kwargs or {}, self.current[-1]
        changed = {t.untyped_storage().data_ptr() for t in written(func, args, kwargs)}
        given = {t.untyped_storage().data_ptr(): t for t in tensors((args, kwargs))}
        result = func(*args, **kwargs)
        if gives_views(func) and not writes(func):
            return result
        here.done += 1
        for place, t in given.items():
            memory = self._of(place, t, here)
            earlier = [memory.wrote, memory.read] if place in changed else [memory.wrote]
            self._check(func, here, earlier, "uses what is still in use")
            (memory.wrote if place in changed else memory.read)[here] = here.done
        self.freed += [self.known.pop(place) for place, m in list(self.known.items()) if m.alive.expired()]
        for memory in [m for m in self.freed if m.home is here]:
            self._check(func, here, [memory.wrote, memory.read], "may be given memory that is still in use")
            self.freed.remove(memory)
        if not writes(func):
            for t in tensors(result if isinstance(result, tuple | list) else [result]):
                self._of(t.untyped_storage().data_ptr(), t, here).wrote[here] = here.done
        return result

    def _of(self, place: int, t: torch.Tensor, here: Stream) -> Memory:
        if place in self.known and self.known[place].alive.expired():
            self.freed.append(self.known.pop(place))
        if place not in self.known:
            self.known[place] = Memory(StorageWeakRef(t.untyped_storage()), here)
        return self.known[place]

    def _check(self, func: Any, here: Stream, earlier: list[dict[Stream, int]], what: str) -> None:
        for stream, number in [pair for uses in earlier for pair in uses.items()]:
            if not here.knows(stream, number):
                self.races.append(f"{func.name()} on {here.name} {what} on {stream.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """In place of torch.cuda's."""
    found = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.current[-1])
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    return found
