"""A file or a folder for one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import BinaryIO

_PRESENT = 1 << 40  # of the bytes that processes lock, the one that all of them share


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


Claim = Callable[[int], AbstractContextManager[bool]]


@contextlib.contextmanager
def claims(path: Path) -> Iterator[Claim]:
    """For processes, also of machines that share the folder, that are at the same work: claim(n) is a block that
    says whether the n-th part, from 0, is this process's alone. As `exclusive`; two threads of one process are not
    kept apart. `path` is there as long as somebody is at the work."""
    with contextlib.closing(_present(path)) as file:
        try:
            yield partial(_claim, file.fileno())
        finally:
            if _ask(file.fileno(), fcntl.LOCK_EX, 0, length=0):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """A block that processes do one after another. `path` is there as long as one is in it or waits."""
    with claims(path) as claim:
        while True:
            with claim(0) as mine:
                if mine:
                    yield
                    return
            time.sleep(0.05)


def _present(path: Path) -> BinaryIO:
    """The file, with the others who are at the work; not one that the last of them is just taking away."""
    while True:
        file = path.open("a+b")
        with contextlib.suppress(FileNotFoundError):
            present = _ask(file.fileno(), fcntl.LOCK_SH, _PRESENT)
            if present and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
        time.sleep(0.01)


@contextlib.contextmanager
def _claim(descriptor: int, number: int) -> Iterator[bool]:
    mine = _ask(descriptor, fcntl.LOCK_EX, number)
    try:
        yield mine
    finally:
        if mine:
            _ask(descriptor, fcntl.LOCK_UN, number)


def _ask(descriptor: int, kind: int, start: int, length: int = 1) -> bool:
    """Whether these bytes of a file are had, of which a length of 0 is all that follow."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB if kind != fcntl.LOCK_UN else kind, length, start)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # any other: there are no locks
    return True


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)  # any other: there are no locks
    return False
