"""Checkpoints written by a thread, while training goes on.

What is to be saved is copied where it lies, which takes the device a moment; bringing it to the host, hashing it
and waiting for the disk is the thread's. One epoch's checkpoints are written at a time, in their order. Until they
are whole, those of the epoch before are what a killed run goes on from.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mwpb_fast.config import KeepConfig
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import note

EVALUATED = ("config", "classes", "channels", "data", "normalize", "best", "memory")


class Writer:
    """Writes a run's checkpoints into `folder`. device: where the tensors of its states lie. keep: how many."""

    def __init__(self, folder: Path, device: torch.device, keep: KeepConfig = KeepConfig()) -> None:  # noqa: B008
        self.folder, self.keep = folder, keep
        self._last = time.monotonic()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Any = None
        self._taken: list[tuple[str, Callable[[], dict[str, Any]]]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._told = False

    @property
    def due(self) -> bool:
        """Whether it is time for a state within an epoch."""
        return 0 < self.keep.minutes < (time.monotonic() - self._last) / 60

    def within(self, state: Callable[[Any], dict[str, Any]], at: Any) -> None:
        """Write in the background the state at a place within an epoch."""
        self.take(state(at), "last")
        self.begin()

    def take(self, state: dict[str, Any], *kinds: str) -> float:
        """Copy a state, of which `begin` writes checkpoints of these kinds. Waits for those before; returns the
        seconds that all of it took. Raises as `wait`."""
        self._last = time.monotonic()
        started = time.perf_counter()
        self.wait()
        try:
            copied = copy.deepcopy(state)
        except torch.OutOfMemoryError:  # beside the training there is no room for it: it is written here and now
            self.now(state, *kinds)
            return time.perf_counter() - started
        self._taken = [(kind, partial(_of_kind, kind, copied)) for kind in kinds]
        if self._stream is not None:
            self._copied = torch.cuda.current_stream(self._stream.device).record_event()
        return time.perf_counter() - started

    def begin(self) -> None:
        """Write what was taken, in the background."""
        if self._taken:
            self._thread = threading.Thread(target=self._work, daemon=True, name="mwpb-checkpoints")
            self._thread.start()

    def now(self, state: dict[str, Any], *kinds: str) -> None:
        """Write checkpoints of a state, and come back when they are on the disk. Raises as `wait`."""
        self.wait()
        for kind in kinds:
            self._save(kind, _of_kind(kind, state))

    def wait(self) -> None:
        """Come back when nothing is being written. Raises CheckpointWriteError where writing failed, now or at any
        time before: nothing that came later is written then, since it counts on what lacks."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()  # a second signal may raise here, and then nobody waits any more
        if self._error is not None:
            self._told = True
            raise self._error

    def settle(self, seconds: float) -> None:
        """Wait for what is being written, for so long at most; to be called by another thread than the run's."""
        if (thread := self._thread) is not None:
            thread.join(seconds)

    def close(self) -> None:
        """Wait, also at the end of a run that has failed in another way; a failure of writing of which nobody has
        heard is named on stderr."""
        told = self._told
        try:
            self.wait()
        except Exception as error:
            if not told:
                note(str(error))

    def _work(self) -> None:
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                if self._stream is not None:
                    self._stream.wait_event(self._copied)
                while self._taken:
                    kind, state = self._taken.pop(0)
                    self._save(kind, state())
        except BaseException as error:  # whoever waits next gets it
            self._error = error
            self._taken = []

    def _save(self, kind: str, state: dict[str, Any]) -> None:
        count = {"best": self.keep.best, "last": self.keep.last}[kind]
        path = checkpoint.save(self.folder, kind, state["epoch"], state.get("batch", 0), state, keep=count)
        if kind == "best" and self.keep.safetensors:
            checkpoint.save_weights(path, state)


def _of_kind(kind: str, state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of that kind holds of a run's whole state."""
    if kind == "last":
        return state
    # what is evaluated: the averaged weights where there are any, named after the epoch that made them
    weights = state["ema"] or state["model"]
    return checkpoint.MARK | {k: state[k] for k in EVALUATED} | {"epoch": state["epoch"] - 1, "model": weights}
