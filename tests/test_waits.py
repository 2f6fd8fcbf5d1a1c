"""How long a run waited for its loader, and memory that a process keeps."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from mwpb_fast.runs.log import Waits, own_version


def test_only_the_wait_for_items_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def slow() -> Iterator[int]:
        for item in range(3):
            sleep(0.02)
            yield item

    items = Waits(slow())
    found = []
    for item in items:
        sleep(0.05)  # the reader's own work
        found.append(item)
    assert found == [0, 1, 2]
    assert items.seconds == pytest.approx(0.06)


def test_an_error_of_the_loader_reaches_the_reader() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    items = Waits(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_freed_memory_is_kept() -> None:
    """A block of 36 MiB that is freed and asked for again is not mapped anew, page by page."""
    code = (
        "import resource, sys, torch\n"
        "from mwpb_fast.system.memory import keep_freed_memory\n"
        "kept = sys.argv[1] == 'keep' and keep_freed_memory()\n"
        "def fill(): torch.ones(9 * 2**20)\n"
        "for _ in range(20): fill()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(4): fill()\n"
        "print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = {}
    for word in ("keep", "default"):
        command = [sys.executable, "-c", code, word]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        kept, number = done.stdout.split()
        if word == "keep" and kept != "True":
            pytest.skip("another C library")
        faults[word] = int(number)
    assert faults["keep"] < 100 < faults["default"]


def test_a_checkout_runs_without_being_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not own_version().endswith("not installed")
    monkeypatch.setattr(sys, "path", [])
    assert own_version().endswith(", not installed")
