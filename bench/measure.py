"""How the benchmarks time, and what every result file says about where and how it was measured.

Variants of one task are timed in turn, round after round in one process, so that a change of the machine's
speed meets all of them alike. On CUDA each is captured in a graph over copies of its inputs that together exceed
the L2 cache, and timed by events.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mwpb_fast.engine.precision import full_float32 as full_float32
from mwpb_fast.engine.recorder import CudaRecorder
from mwpb_fast.system.files import to_json
from mwpb_fast.system.memory import keep_freed_memory as keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
LEAST_ROUND = 2e-3  # seconds; a shorter round is repeated within one reading of the clock
LEAST_ROUNDS = 3  # whatever the time
ROTATED = 256 * 2**20  # bytes of inputs that a graph walks through before it meets the first again


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the rounds and the quartiles about it."""

    median: float
    low: float
    high: float
    rounds: int


def timing(seconds: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return Timing(median, low, high, len(seconds))


def hand_back_freed_memory() -> bool:
    """The opposite of keep_freed_memory: what glibc's own thresholds grow to in a program that frees large
    blocks, 32 MiB for mapping a block by itself and twice that for shrinking the heap. Whether that is so now."""
    try:
        library = ctypes.CDLL(None)
        done = library.mallopt(-3, 32 * 2**20) and library.mallopt(-1, 64 * 2**20)
        library.malloc_trim(0)
    except (AttributeError, OSError):
        return False
    return bool(done)


class OnCpu:
    """A call and how often it is made in one round."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        call()
        start = time.perf_counter()
        call()
        self.repeats = max(1, min(1000, int(LEAST_ROUND / max(time.perf_counter() - start, 1e-9))))

    def round(self) -> float:
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        return (time.perf_counter() - start) / self.repeats


class OnCuda:
    """Calls over several copies of the inputs, replayed as one graph; eager where capture fails."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = calls
        for call in (*calls, calls[0]):
            call()
        torch.cuda.synchronize()
        self.graph: CudaRecorder | None = CudaRecorder(torch.device("cuda"))
        try:
            self.graph.capture(lambda: [call() for call in calls])
        except Exception:  # whatever cannot be captured is timed with its launches
            self.graph = None
            torch.cuda.synchronize()

    def round(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(self.calls)


def turns(count: int, deadline: float) -> Iterator[int]:
    """0, 1, ... for so many rounds, but no further one from `deadline` of time.monotonic() on, three apart."""
    for turn in range(count):
        if turn >= LEAST_ROUNDS and time.monotonic() > deadline:
            return
        yield turn


def in_turn(tasks: dict[str, OnCpu | OnCuda], rounds: int, budget: float) -> dict[str, Timing]:
    """Time the tasks one after the other, `rounds` times, or while `budget` seconds last but at least 3 times."""
    for task in tasks.values():  # warm-up
        task.round()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in turns(rounds, time.monotonic() + budget):
        for name, task in tasks.items():
            seconds[name].append(task.round())
    return {name: timing(values) for name, values in seconds.items()}


def seconds(run: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call: by CUDA events on a GPU, by `clock` elsewhere."""
    if device.type != "cuda":
        start = clock()
        run()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The spread of the quotients, round by round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


class Memory:
    """`with Memory(device) as memory: ...` then `memory.bytes`: the most that was held inside beyond what was
    held before. Of the device on CUDA; elsewhere of the process, None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.bytes: int | None = None
        self.before: int | None = None

    def __enter__(self) -> Memory:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # a peak starts from what is held now
            self.before = _held("VmHWM")
        except OSError:  # this system keeps no such file
            pass
        return self

    def __exit__(self, *exc: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self.cuda else _held("VmHWM")
        if self.before is not None and peak is not None:
            self.bytes = peak - self.before


def _held(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        return None


# command lines -----------------------------------------------------------------------------------------------
def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser of what most scripts take; `settled` makes use of it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser


def settled(o: argparse.Namespace) -> argparse.Namespace:
    """With o.device as a device and o.kept, whether freed memory is kept, as the trainer has it on the CPU."""
    if o.threads:
        torch.set_num_threads(o.threads)
    o.device = torch.device(o.device)
    o.kept = keep_freed_memory() if o.device.type == "cpu" else None
    return o


# result files ------------------------------------------------------------------------------------------------
class SkippedError(RuntimeError):
    """Why something does not run here."""


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0] else type(error).__name__


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, marked where tracked files but for results differ from it; outside of git, what
    MWPB_COMMIT says."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", ".", ":!bench/results")
        return git("rev-parse", "HEAD")[:12] + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MWPB_COMMIT", "unknown")


def command() -> str:
    """The command line, with the script's path from the checkout's root."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])


def circumstances(device: torch.device) -> dict[str, str]:
    """Device, versions, command and commit: what stands beside every figure."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    try:
        import triton

        triton_version = triton.__version__
    except (Exception, SystemExit):  # missing, or broken in any way
        triton_version = "none"
    return {
        "device": name,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton_version}",
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_results(path: Path, device: torch.device, columns: Any, rows: list[dict], **more: Any) -> None:
    """A result file: circumstances, columns (key, title, format) for `bench/tables.py`, and the rows. It
    appears whole or not at all. columns: a list, or for rows of several kinds a list by the rows' `kind`."""
    write_content(path, {**circumstances(device), **more, "columns": columns, "rows": rows})


def write_content(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
