"""How many threads OpenMP may use on this machine, and how long one that waits for the others keeps its core.

PyTorch's operations on the CPU are short parallel regions, and their threads wait for one another at the end of
each. By default GNU's OpenMP lets a waiting thread spin for milliseconds: while another program holds the core
of the thread that it waits for, nobody gets on. A thread that sleeps at once loses as much on an idle machine,
where every region then begins with a wake-up. In between lies a spin somewhat longer than the gap between two
regions. OpenMP reads its settings once, when it is loaded, so they are made before PyTorch is imported. They
change no result; a number of threads that followed the load would, since sums are then rounded in another order.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SPIN = 400e-6  # seconds: longer than what lies between two regions, shorter than a turn of the scheduler
_DEFAULT = 300_000  # rounds that GNU's OpenMP spins unless it is told otherwise
_TRIED, _ASLEEP = 100_000, 0.05  # rounds of the measured spin; seconds, which is longer on any processor
_WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

# One thread waits for another one that sleeps: the processor time of the waiting one is that of its spin. The
# first region starts the threads, so it is left out; the shortest of the others has met no interruption.
_MEASURE = """
import ctypes, sys, time
library = ctypes.CDLL(sys.argv[1])
def work(_):
    if library.omp_get_thread_num():
        time.sleep(float(sys.argv[2]))
work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
times = []
for _ in range(4):
    start = time.thread_time()
    library.GOMP_parallel(work, None, 2, 0)
    times.append(time.thread_time() - start)
print(min(times[1:]))
"""


@dataclass(frozen=True)
class Choice:
    """What was chosen, in words for `doctor` and the log."""

    threads: str
    waiting: str

    def __str__(self) -> str:
        return f"{self.threads}; {self.waiting}"


_chosen: Choice | None = None


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OpenMP's variables in `environment` where the user has not, before PyTorch is imported; once.

    The number of threads is lowered to what the processor mask and the CPU quota of the control group allow; a
    waiting thread spins for about SPIN, by measurement of the rounds that this takes here.
    """
    global _chosen
    if _chosen is not None or "torch" in sys.modules:
        return
    _chosen = Choice(_limit_threads(environment), _limit_waiting(environment))


def chosen() -> str:
    """What `prepare` chose; that nothing was where it was not called in time."""
    return str(_chosen) if _chosen is not None else "as OpenMP has it: PyTorch was imported before"


def available() -> tuple[int, str]:
    """How many threads can run at the same time in this process, and what sets that limit."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # a system without processor masks
        count = os.cpu_count() or 1
    quota = cpu_quota()
    if quota is not None and quota < count:
        return max(1, int(quota)), f"a CPU quota of {quota:g}"
    return count, "all that this process may use"


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors' worth of time that the process's control groups (version 1 or 2) allow; None for no limit."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        for line in groups.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            place = root if not controllers else root / "cpu"
            # a limit on any group above holds as well; in a container the group's own path may not be visible
            inside = place / path.lstrip("/")
            for folder in (inside, *inside.parents):
                if not folder.is_relative_to(place):
                    break
                limit = _limit(folder)
                limits += [] if limit is None else [limit]
    return min(limits, default=None)


def _limit(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text(encoding="utf-8") for name in names)
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    return None


def _limit_threads(environment: MutableMapping[str, str]) -> str:
    if given := [name for name in _COUNTS if environment.get(name)]:
        return f"threads as {given[0]}={environment[given[0]]} says"
    count, why = available()
    if count < (os.cpu_count() or 1):
        environment["OMP_NUM_THREADS"] = str(count)
    return f"up to {count} thread{'s' * (count > 1)} ({why})"


def _limit_waiting(environment: MutableMapping[str, str]) -> str:
    if given := [name for name in _WAITS if environment.get(name)]:
        return f"waiting threads as {given[0]}={environment[given[0]]} says"
    if environment.get("OMP_NUM_THREADS", str(available()[0])) == "1":
        return "a single thread waits for nobody"
    library = gnu_openmp()
    rounds = None if library is None else spin_rounds(library)
    if rounds is None:
        return "waiting threads as OpenMP has it: its spin could not be measured"
    environment["GOMP_SPINCOUNT"] = str(rounds)
    return f"waiting threads spin for {1e6 * SPIN:.0f} us (GOMP_SPINCOUNT={rounds}), then sleep"


def gnu_openmp() -> Path | None:
    """GNU's OpenMP library as PyTorch brings it, found without importing PyTorch; None where it uses another."""
    spec = find_spec("torch")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        package = Path(place)
        for folder in (package / "lib", package.parent / "torch.libs"):
            if found := sorted(folder.glob("libgomp*.so*")):
                return found[0]
    return None


def spin_rounds(library: Path, seconds: float = SPIN) -> int | None:
    """How many rounds of the library's waiting loop take so long here; None where that cannot be measured.

    A round is one pause instruction, which takes from 10 to 140 cycles by the processor's make.
    """
    # the user's settings of OpenMP would be measured else
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    own |= {"GOMP_SPINCOUNT": str(_TRIED), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-S", "-E", "-c", _MEASURE, str(library), str(_ASLEEP)]
    try:
        ended = subprocess.run(command, env=own, capture_output=True, encoding="utf-8", timeout=10, check=True)
        each = float(ended.stdout) / _TRIED
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return max(1, min(_DEFAULT, round(seconds / each))) if each > 0 else None
