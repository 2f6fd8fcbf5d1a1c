"""How the benchmarks time, and what every result file says about where and how it was measured.

Variants of one task are timed in turn, round after round in one process, so that a change of the machine's
speed meets all of them alike. On CUDA each is captured in a graph over copies of its inputs that together exceed
the L2 cache, and timed by events.
"""

from __future__ import annotations

import ctypes
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LEAST_ROUND = 2e-3  # seconds; a shorter round is repeated within one reading of the clock
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


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, as a training process would; else a large result is timed by page faults."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, 2**31 - 1))


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
        self.graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                for call in calls:
                    call()
        except RuntimeError:
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


def in_turn(tasks: dict[str, OnCpu | OnCuda], rounds: int, budget: float) -> dict[str, Timing]:
    """Time the tasks one after the other, `rounds` times, or while `budget` seconds last but at least 3 times."""
    for task in tasks.values():  # warm-up
        task.round()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for name, task in tasks.items():
            seconds[name].append(task.round())
    return {name: timing(values) for name, values in seconds.items()}


# result files ------------------------------------------------------------------------------------------------
def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, marked where tracked files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD")[:12] + (
            " with changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def circumstances(device: torch.device) -> dict[str, str]:
    """Device, versions, command and commit: what stands beside every figure."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": name,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton_version}",
        "command": shlex.join(
            ["python", Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *sys.argv[1:]]
        ),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_results(
    path: Path, device: torch.device, columns: Sequence[Sequence[str]], rows: list[dict], **more: Any
):
    """A result file: circumstances, columns (key, title, format) for `bench/tables.py`, and the rows."""
    content = {**circumstances(device), **more, "columns": [list(c) for c in columns], "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
