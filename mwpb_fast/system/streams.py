"""Standard output and error that outlive their readers.

A pipe whose reader left, a terminal that went away, a full disk or a descriptor that was closed from the start
cost a run its messages, and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Lasting:
    """A text stream like `inside`, whose writes never fail. failure: the error of the first that did, after which
    all others go nowhere."""

    def __init__(self, inside: TextIO) -> None:
        self._inside = inside
        self.failure: OSError | ValueError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    def write(self, text: str) -> int:
        """As a text stream's; characters that its encoding does not have are written as escapes."""
        try:
            return self._inside.write(text)
        except UnicodeEncodeError:
            encoding = self._inside.encoding or "ascii"
            return self._inside.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._fail(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._inside.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: OSError | ValueError) -> None:
        self.failure = self.failure or error
        # in place of the descriptor, since libraries write to it on their own, and what is in the buffer must go
        # somewhere before the interpreter can leave
        with contextlib.suppress(OSError, ValueError):
            _to_nowhere(self._inside.fileno())
            self._inside.flush()

    @property
    def broken(self) -> str:
        """Why nothing can be written any more; empty for a reader that left, who knows."""
        if self.failure is None or isinstance(self.failure, BrokenPipeError):
            return ""
        return getattr(self.failure, "strerror", None) or str(self.failure)


@contextlib.contextmanager
def lasting() -> Iterator[tuple[Lasting, Lasting]]:
    """Standard output and error as Lasting ones inside the block."""
    _occupy()
    before = sys.stdout, sys.stderr
    opened: list[TextIO] = []
    both = []
    for stream in before:
        if stream is None:  # closed before Python was started
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # closed below
            opened.append(stream)
        both.append(Lasting(stream))
    out, err = both
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        for stream in opened:
            stream.close()


def _occupy() -> None:
    """Give the closed ones among descriptors 0, 1 and 2 to the null device: the next file that is opened would
    get that number, and with it whatever a library prints."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)


def _to_nowhere(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def to_terminal() -> bool:
    """Whether standard error is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except (io.UnsupportedOperation, ValueError):
        return False
