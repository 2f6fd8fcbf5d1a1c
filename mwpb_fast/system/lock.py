"""A file or a folder for one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process has `path`, a folder or a file that is made where it is not there, to itself.

    wait: come back only when it has. The system lets go of it however the process ends. Raises OSError where it
    cannot be opened; on a file system that has no locks everyone has it.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        while taken := _taken(descriptor):
            if not wait:
                break
            time.sleep(0.2)
        yield not taken
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def part_of(descriptor: int, number: int) -> Iterator[bool]:
    """Whether this process has the part of that number, from 0, of an open file to itself. As `exclusive`, also
    between machines that share the file; two threads of one process are not kept apart."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError as error:
        yield error.errno not in (errno.EACCES, errno.EAGAIN)  # any other: there are no locks
        return
    try:
        yield True
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, number)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)  # any other: there are no locks
    return False
