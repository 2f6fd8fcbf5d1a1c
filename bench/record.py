"""Result files that grow part by part, so that a benchmark that is cut off or crashes leaves what it has done."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import circumstances, reason, write_content


def read_content(path: Path | None) -> dict[str, Any]:
    """What a result file holds; nothing where there is none."""
    try:
        content = json.loads(path.read_bytes()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Results:
    """A result file that is written anew after each of its parts (a recipe, an op, a round), so that what is done
    survives. It lists the parts that are `unfinished` as long as there are some; the same command on the same
    commit, versions and device goes on with those. What could not run is in `skipped`, with the reason.

    path: None to write nothing. parts: what is to be done, in order. more: what stands beside the rows.
    """

    def __init__(
        self, path: Path | None, device: torch.device, columns: Any, parts: Iterable[str], **more: Any
    ) -> None:
        self.path, self.device, self.columns = path, device, columns
        self.about = circumstances(device)
        self.rows: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.unfinished, self.more = list(parts), more
        found = read_content(path)
        same = all(found.get(key) == value for key, value in self.about.items() if key != "date")
        if same and set(found.get("unfinished", ())) <= set(self.unfinished) and found.get("unfinished"):
            self.rows, self.skipped, self.unfinished = found["rows"], found["skipped"], found["unfinished"]
            self.more = {key: found.get(key, value) for key, value in more.items()}
            self.write()
            print(f"going on with {', '.join(self.unfinished)}", flush=True)

    def put(self, part: str, rows: Iterable[dict[str, Any]], done: bool = True) -> None:
        """Write the part's rows in place of those put before. done: whether it is finished with that."""
        self.rows = [row for row in self.rows if row["part"] != part] + [{**row, "part": part} for row in rows]
        if done:
            self.unfinished.remove(part)
        self.write()

    def fitting(self, parts: Iterable[str], end: float) -> Iterator[str]:
        """The parts as long as one more will be done by `end`, of time.monotonic(), judging by the longest before
        it. The others are left to the next run."""
        longest = 0.0
        for part in list(parts):
            begun = time.monotonic()
            if begun + longest > end:
                print(f"left for the next run: {', '.join(self.unfinished)}", flush=True)
                return
            yield part
            longest = max(longest, time.monotonic() - begun)

    def skip(self, name: str, error: BaseException) -> None:
        """Name what cannot run, and why; the others go on. Ends the process where none of them could."""
        self.skipped[name] = reason(error)
        print(f"skipped {name}: {self.skipped[name]}", flush=True)
        self.write()
        if not usable(self.device):
            raise SystemExit(f"{name} has left the device unusable for this process")

    def write(self) -> None:
        if self.path is None:
            return
        left = {"unfinished": self.unfinished} if self.unfinished else {}
        content = {**self.about, **self.more, "skipped": self.skipped, **left}
        write_content(self.path, {**content, "columns": self.columns, "rows": self.rows})


def usable(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access to its memory nothing does in the same process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def leave_at_sigterm() -> None:
    """From now on SIGTERM ends the process by way of `finally`, so that temporary folders go."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
