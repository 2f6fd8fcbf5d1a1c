"""Signals that ask a run to stop: a request that loops look at, so that it leaves at a point it can go on from.

SIGHUP is a terminal that went away, SIGUSR1 a scheduler's warning (`sbatch --signal=USR1@60`). A signal that was
ignored when the program was started, as `nohup` and a shell's background do, stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(BaseException):
    """The work was told to stop by signal `number`; what is done so far is saved.

    Not an Exception, as KeyboardInterrupt is none: no code that expects failures of a read or of a model may take
    it for one of them.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.number = number


class StopRequest:
    """`number` is the signal that asked to stop, the first of several; 0 while there is none."""

    def __init__(self) -> None:
        self.number = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside the block a signal only sets the request. A second SIGTERM or SIGINT acts as before the block; SIGHUP
    and SIGUSR1 do not, because kernel, shell and scheduler each send their own for one and the same event."""
    request = StopRequest()

    def note(number: int, frame: Any) -> None:
        request.number = request.number or number
        if number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, before[signal.Signals(number)])

    with handled(STOPS, note) as before:
        yield request


@contextmanager
def raised() -> Iterator[None]:
    """Inside the block a signal raises Interrupted where the program is, so that what is open is closed; SIGINT
    raises KeyboardInterrupt, as ever."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(number)

    with handled([number for number in STOPS if number != signal.SIGINT], stop):
        yield


@contextmanager
def handled(
    numbers: tuple[signal.Signals, ...] | list[signal.Signals], handler: Callable[[int, Any], None]
) -> Iterator[dict[signal.Signals, Any]]:
    """Inside the block `handler` takes these signals, but for ignored ones; yields who took them before. In a
    thread other than the main one, which may not ask for signals, nothing changes."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
        # None: taken by something other than Python, which could not be given back
        before = {number: taken for number, taken in before.items() if taken not in (signal.SIG_IGN, None)}
    with contextlib.ExitStack() as stack:
        for number, taken in before.items():
            stack.callback(signal.signal, number, taken)
            signal.signal(number, handler)
        yield before
