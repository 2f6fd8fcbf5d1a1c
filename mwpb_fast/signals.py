"""SIGTERM and SIGINT as a request that loops look at, so that a run leaves at a point it can go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):  # noqa: N818  # not an error: the work was told to stop, and is saved
    """The work was told to stop by signal `number`; what is done so far is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.number = number


class StopRequest:
    """`number` is the signal that asked to stop, 0 while there is none."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside the block the first SIGTERM or SIGINT only sets the request; a second one acts as before it."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        request.number = number
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
