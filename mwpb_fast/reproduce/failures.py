"""What runs died of, in a file of each run's folder, so that all processes that share them know it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from mwpb_fast.reproduce.plan import PlannedRun
from mwpb_fast.system.files import write_atomically

NOTE = "failed.txt"


class Failures:
    """Those of `runs`. anew: nothing counts that happened before."""

    def __init__(self, runs: Sequence[PlannedRun], anew: bool = False) -> None:
        self.runs, self.mine = runs, dict[Path, str]()
        for run in runs if anew else ():
            with contextlib.suppress(OSError):
                (run.folder / NOTE).unlink()

    def of(self, run: PlannedRun) -> str:
        """Why a run failed; empty where it did not."""
        with contextlib.suppress(OSError):
            return (run.folder / NOTE).read_text(encoding="utf-8").strip()
        return self.mine.get(run.folder, "")

    def all(self) -> dict[str, str]:
        """Run name -> reason."""
        return {run.name: reason for run in self.runs if (reason := self.of(run))}

    def add(self, run: PlannedRun, reason: str) -> None:
        """Note a failure; the other processes find it out for themselves where the folder cannot say it."""
        self.mine[run.folder] = reason
        with contextlib.suppress(OSError):
            if not run.foreign():
                write_atomically(run.folder / NOTE, f"{reason}\n".encode())
