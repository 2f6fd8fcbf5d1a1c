"""Commands in processes of their own that say what they are doing, so that they can be killed in the middle of it.

A server imports PyTorch once and forks a process for each command, which therefore starts within milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# phase of a command: the functions, by module and name, whose calls it consists of
PHASES = {
    "training": [("mwpb_fast.train", "Trainer._train_epoch")],
    "validation": [("mwpb_fast.train", "Trainer.validate")],
    "writing": [("mwpb_fast.runs.checkpoint", "write_atomically")],
    "evaluation": [("mwpb_fast.evaluation.sharded", "ShardedAttack._attack")],
    "autoattack": [("mwpb_fast.evaluation.watched", "Watched.forward")],
    "preparation": [("mwpb_fast.data.store", "Staging.write"), ("mwpb_fast.data.store", "Staging.commit")],
}
OWN = ("cli.entry", "train", "evaluation.checkpoint", "evaluation.autoattack", "data.prepare", "runs.plots")
OTHERS = ("matplotlib.backends.backend_agg", "torch.utils.tensorboard.writer", "sklearn.datasets", "torture_child")
PRELOADED = ["torch", *(f"mwpb_fast.{name}" for name in OWN), *OTHERS]
PATIENCE = 900.0  # seconds for a command of a second, on a machine with much else to do


def announced(function: Callable[..., Any], phase: str, pipe: Connection) -> Callable[..., Any]:
    """The function, which sends the name of its phase whenever it is called."""

    @functools.wraps(function)
    def wrapper(*words: Any, **more: Any) -> Any:
        with contextlib.suppress(OSError):  # nobody listens any more, or has not listened for long
            pipe.send_bytes(phase.encode())
        return function(*words, **more)

    return wrapper


def work(words: Sequence[str], folder: Path, pipe: Connection) -> None:
    """What a process does: the command, with its output in `folder`; it ends with the command's status."""
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.set_blocking(pipe.fileno(), False)
    # what a shell that runs the whole in the background has had ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for phase, places in PHASES.items():
        for module, name in places:
            owner: Any = __import__(module, fromlist=["x"])
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, last, announced(getattr(owner, last), phase, pipe))
    from mwpb_fast.cli import main

    status = main(list(words))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Command:
    """A running command. `wait_for` a phase, `kill`, or see its `status`."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.words, self.folder = list(words), folder
        self.pipe, theirs = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=work, args=(self.words, folder, theirs))
        self.process.start()
        theirs.close()

    def wait_for(self, phase: str, times: int = 1) -> bool:
        """Whether it came to that phase so many times before it ended."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if self.pipe.poll(0.05) and self.pipe.recv_bytes().decode() == phase:
                    times -= 1
                    if times == 0:
                        return True
            except (EOFError, OSError):
                return False
        raise TimeoutError(f"{self.words} did not come to {phase}")

    def status(self) -> int:
        """Its exit status, once it has ended; minus the number of a signal that ended it."""
        end = time.monotonic() + PATIENCE
        while self.process.is_alive() and time.monotonic() < end:
            with contextlib.suppress(EOFError, OSError):
                while self.pipe.poll(0.05):
                    self.pipe.recv_bytes()
            self.process.join(0.05)
        if self.process.is_alive():
            self.kill()
            raise TimeoutError(f"{self.words} did not end")
        self.pipe.close()
        return int(self.process.exitcode or 0)

    def kill(self) -> None:
        """As kill -9."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    @property
    def errors(self) -> str:
        return (self.folder / "err.txt").read_text(encoding="utf-8")


def run(words: Sequence[str], folder: Path) -> None:
    """A command to its end. Raises AssertionError, with what it said, where that is not 0."""
    command = Command(words, folder)
    status = command.status()
    assert status == 0, f"{words}: status {status}: {command.errors.strip()[-300:]}"


def processor_seconds() -> float:
    """The processors' time of this process and all that it has started, whether they have ended or not."""
    found: dict[int, tuple[int, float]] = {}  # process: its parent, and its ticks with those of its ended children
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (place / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            found[int(place.name)] = int(fields[1]), sum(map(int, fields[11:15]))

    def ours(number: int) -> bool:
        return number == os.getpid() or (number in found and ours(found[number][0]))

    return sum(ticks for number, (_, ticks) in found.items() if ours(number)) / os.sysconf("SC_CLK_TCK")


def prepare_server() -> None:
    """Before the first command: what the server imports, and that each process has one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MWPB_QUIET": "1"}
    CONTEXT.set_forkserver_preload(PRELOADED)


CONTEXT = multiprocessing.get_context("forkserver")
