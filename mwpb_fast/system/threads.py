"""How many threads OpenMP may use on this machine, and whether one that waits for the others spins or sleeps.

PyTorch's operations on the CPU are short parallel regions, and their threads wait for one another at the end of
each. GNU's OpenMP lets a waiting thread spin for milliseconds. That is best as long as every thread has a core,
since one that sleeps has to be woken for each region. But while another program holds the core of the thread that
is waited for, nobody gets on, and then sleeping is many times faster. The kernel counts how long threads were
ready and had no core, so it is known which of the two holds. Neither changes a result; a number of threads that
followed the load would, since sums are then rounded in another order.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from importlib.util import find_spec
from pathlib import Path

_WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# So many seconds lie between two looks at the kernel's count.
INTERVAL = 0.5
# Above and below these shares of the time, summed over the threads, that they were ready and had no core, the
# processor counts as contended and as free.
CONTENDED, FREE = 0.1, 0.03
# After so many looks in a row without contention threads spin again.
CALM = 2

_limit = "as many threads as PyTorch takes: it was imported before that could be limited"


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lower OMP_NUM_THREADS in `environment` to what processor mask and CPU quota (of the control groups) allow.

    It must be called before PyTorch is imported, which reads the variable once. The user's own setting stays.
    """
    global _limit
    if "torch" in sys.modules:
        return
    if given := [name for name in _COUNTS if environment.get(name)]:
        _limit = f"threads as {given[0]}={environment[given[0]]} says"
        return
    count, why = available()
    if count < (os.cpu_count() or 1):
        environment["OMP_NUM_THREADS"] = str(count)
    _limit = f"up to {count} thread{'s' * (count > 1)} ({why})"


def chosen() -> str:
    """What holds for this process, in words for `doctor` and the record of a run."""
    return f"{_limit}; {_plan()[1]}"


def available() -> tuple[int, str]:
    """How many threads can run at the same time in this process, and what sets that limit."""
    count, quota = processors(), cpu_quota()
    if quota is not None and quota < count:
        return max(1, int(quota)), f"a CPU quota of {quota:g}"
    return count, "all that this process may use"


def processors() -> int:
    """How many processors this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # a system without processor masks
        return os.cpu_count() or 1


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
                limit = _quota_of(folder)
                limits += [] if limit is None else [limit]
    return min(limits, default=None)


def _quota_of(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text(encoding="utf-8") for name in names)
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    return None


def gnu_openmp() -> Path | None:
    """GNU's OpenMP library as PyTorch brings it, found without importing PyTorch; None where it uses another."""
    spec = find_spec("torch")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        package = Path(place)
        for folder in (package / "lib", package.parent / "torch.libs"):
            if found := sorted(folder.glob("libgomp*.so*")):
                return found[0]
    return None


def _plan() -> tuple[Path | None, str]:
    """The library whose threads are to be watched, None where they are left alone; and what holds, in words."""
    if given := [name for name in _WAITS if os.environ.get(name)]:
        return None, f"waiting threads as {given[0]}={os.environ[given[0]]} says"
    if os.environ.get("OMP_NUM_THREADS", str(available()[0])) == "1":
        return None, "a single thread waits for nobody"
    library = gnu_openmp()
    if library is None or waited() is None:
        return None, "waiting threads as OpenMP has it"
    return library, "waiting threads spin, but sleep while other programs want the processor"


def waited(tasks: Path = Path("/proc/self/task")) -> float | None:
    """Seconds that this process's threads were ready to run and had no core, summed; None where the kernel does
    not count them. Threads that have ended take theirs with them."""
    found = []
    with contextlib.suppress(OSError):
        for task in tasks.iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
                found.append(int((task / "schedstat").read_bytes().split()[1]))
    return sum(found) / 1e9 if found else None


class Sleep:
    """Lets waiting threads of GNU's OpenMP sleep instead of spin, from `begin` to `end`.

    OpenMP spins a hundred rounds at most where it has more threads than there are processors, as its manual says
    of GOMP_SPINCOUNT. So a team of threads is made that does nothing, and is kept.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._done = threading.Event()
        self._team: threading.Thread | None = None

    @property
    def on(self) -> bool:
        """Whether threads sleep now."""
        return self._team is not None

    def begin(self) -> None:
        """From the next wait on."""
        if self._team is None:
            self._done.clear()
            self._team = threading.Thread(target=self._hold, daemon=True, name="mwpb-openmp-team")
            self._team.start()

    def end(self) -> None:
        """Waiting threads spin again."""
        if self._team is not None:
            self._done.set()
            self._team.join()
            self._team = None

    def _hold(self) -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of a null pointer, it does nothing
        self._library.GOMP_parallel(nothing, None, processors() + 1, 0)
        self._done.wait()


class Watch:
    """Chooses by what the kernel counts. sleep: what is switched. calm: how often in a row there was no contention
    while threads slept."""

    def __init__(self, sleep: Sleep) -> None:
        self.sleep, self.calm = sleep, 0

    def look(self, share: float) -> None:
        """share: of the time since the last look, summed over the threads, ready without a core."""
        if share > CONTENDED:
            self.calm = 0
            self.sleep.begin()
        elif share < FREE and self.sleep.on:
            self.calm += 1
            if self.calm >= CALM:
                self.sleep.end()


_watching = False


@contextlib.contextmanager
def adaptive_openmp_waits(interval: float = INTERVAL) -> Iterator[None]:
    """Inside the block, OpenMP's waiting threads spin or sleep by whether the processor is contended.

    Nothing is done where the user has said how they wait, for a single thread, for another OpenMP, or in a block
    within a block.
    """
    global _watching
    path, _ = _plan()
    if path is None or _watching:
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        try:  # the instance that PyTorch has loaded, or none
            sleep = Sleep(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW))
        except OSError:
            return
        choice, before, at = Watch(sleep), waited(), time.monotonic()
        while not stop.wait(interval):
            count, now = waited(), time.monotonic()
            if before is not None and count is not None:
                choice.look((count - before) / (now - at))
            before, at = count, now
        sleep.end()

    watcher = threading.Thread(target=watch, daemon=True, name="mwpb-openmp-watch")
    _watching = True
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        _watching = False
