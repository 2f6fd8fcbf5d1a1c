"""Helper processes of this program: started, watched, and gone when the work is over, however it ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence


class Helpers:
    """Helper processes at work."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        self.processes = processes
        self.count = len(processes)

    def wait(self, tick: Callable[[], None]) -> None:
        """Returns when none of them works any more, however they ended; calls tick now and then."""
        while any(process.poll() is None for process in self.processes):
            tick()
            time.sleep(0.05)


@contextlib.contextmanager
def helper_processes(code: str, arguments: Sequence[str], threads: int) -> Iterator[Helpers]:
    """For each of `arguments` a Python process that runs `code` with it, on so many threads.

    They see this process's module path (-P: and not the current folder before it), and are ended with the block.
    Signals of the terminal do not reach them; they must look at `orphaned` to notice that this process was killed.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    quiet = {"MWPB_QUIET": "1"}  # this process tells of slow ops by itself
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)} | quiet
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for argument in arguments:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", code, argument, str(os.getpid())],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        yield Helpers(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def orphaned(parent: int) -> bool:
    """Whether the process that started this one is gone."""
    return os.getppid() != parent
