"""A watchdog: says where a program hangs, and ends it, when it has shown no sign of life for too long."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_LOOKS = 20  # within the time that it waits


class Watchdog:
    """Inside the block a thread calls `hung` where nobody has called `beat` for so many seconds; 0: never.

    It counts its own looks and not the clock, so that a process that was stopped (Ctrl-Z, a suspended machine) is
    not taken for one that hangs. Code that keeps Python's own lock while it hangs keeps the watchdog from looking,
    too; PyTorch's operations let go of it.
    """

    def __init__(self, seconds: float, hung: Callable[[], None]) -> None:
        self.seconds, self.hung = seconds, hung
        self._silent = 0
        self._over = threading.Event()

    def beat(self) -> None:
        """A sign of life."""
        self._silent = 0

    def __enter__(self) -> Watchdog:
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True, name="mwpb-watchdog").start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self.seconds / _LOOKS):
            self._silent += 1
            if self._silent > _LOOKS:
                return self.hung()


def write_stacks(path: Path) -> str:
    """Write what every thread is doing to stderr and to `path`; returns the main thread's innermost place."""
    faulthandler.dump_traceback(2)  # the descriptor: whatever stands in for sys.stderr may be what hangs
    with contextlib.suppress(OSError), path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file)
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "an unknown place"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
