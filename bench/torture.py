"""What is promised of runs that are killed, disks that fail and input that is hostile, tried at length.

Each part is tried and written into the result file before the next; the same command on the same commit, versions
and device goes on with those that are left, the dear ones last. With --keep, what an earlier commit counted
without failure is left as it is, and the table says which commit that was. docs/reliability.md has the table; what
was not run stands there too. "computed" is the processors' time, which other work on the machine hardly changes.

    make torture
    python bench/torture.py --json bench/results/torture.json --parts kills disk
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, circumstances, reason, write_content
from record import leave_at_sigterm, read_content
from torture_child import prepare_server, processor_seconds
from torture_kills import Count
from torture_parts import Part, parts

COLUMNS = [
    ["promise", "promise", ""],
    ["tried", "tried by", ""],
    ["cases", "cases", ",d"],
    ["failures", "failures", "d"],
    ["minutes", "minutes", ".1f"],
    ["computed", "computed, min", ".1f"],
    ["notes", "", ""],
]
DEAR = ("hostile", "signals", "together", "kills", "ranks", "sanitizers", "large", "fuzz", "ops")


class Results:
    """The result file. done: by part, what it counted; failed parts could not be tried."""

    def __init__(self, path: Path | None, every: list[Part], keep: bool = False) -> None:
        self.path, self.every, self.about = path, every, circumstances(torch.device("cpu"))
        found = read_content(path)
        same = all(found.get(key) == self.about[key] for key in ("device", "versions"))
        self.done: dict[str, dict[str, Any]] = {}
        for name, one in found.get("done", {}).items() if same else ():
            one.setdefault("commit", found["commit"])
            good = one["cases"] is not None and not one["failures"]
            if one["commit"] == self.about["commit"] or (keep and good):
                self.done[name] = one

    def put(self, part: Part, count: Count | None, seconds: float, computed: float, problem: str = "") -> None:
        self.done[part.name] = {
            "cases": count.cases if count else None, "failures": count.failures if count else [],
            "seconds": seconds, "computed": computed, "commit": self.about["commit"],
            "notes": count.notes if count else f"not run: {problem}",
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        if self.path is not None:
            left = [part.name for part in self.every if part.name not in self.done]
            unfinished = {"unfinished": left} if left else {}
            content = {**self.about, **unfinished, "columns": COLUMNS, "rows": self.rows(), "done": self.done}
            write_content(self.path, content)

    def rows(self) -> list[dict[str, Any]]:
        """Of every promise and way of trying it, also those that have not been tried; a promise is named once."""
        rows, before = [], ""
        for (promise, tried), group in itertools.groupby(self.every, lambda part: (part.promise, part.tried)):
            names = [part.name for part in group]
            found = [self.done[name] for name in names if name in self.done]
            counted = [one for one in found if one["cases"] is not None]
            failures = [failure for one in counted for failure in one["failures"]]
            notes = list(dict.fromkeys(one["notes"] for one in found if one["notes"]))
            past = dict.fromkeys(one["commit"] for one in found if one["commit"] != self.about["commit"])
            notes += [f"at commit {commit}" for commit in past]
            if left := len(names) - len(found):
                notes.append(f"not run: {left} of {len(names)} parts" if found else "not run")
            computed: list[Any] = [one.get("computed") for one in found]
            rows.append({
                "promise": promise if promise != before else "", "tried": tried,
                "cases": sum(one["cases"] for one in counted) if counted else None,
                "failures": len(failures) if counted else None,
                "minutes": sum(one["seconds"] for one in found) / 60 if found else None,
                "computed": sum(computed) / 60 if found and None not in computed else None,
                "notes": "; ".join(" ".join(note.split()) for note in (*notes, *failures[:3])),
            })  # fmt: skip
            before = promise
        whole = {key: sum(row[key] or 0 for row in rows) for key in ("cases", "failures", "minutes", "computed")}
        return [*rows, {"promise": "all of it", "tried": "", **whole, "notes": ""}]


def attempt(part: Part, results: Results, scratch: Path) -> None:
    folder = scratch / part.name.replace(":", "-")
    folder.mkdir()
    print(f"{part.name}: begun", flush=True)
    begun, computed = time.monotonic(), processor_seconds()

    def spent() -> tuple[float, float]:
        return time.monotonic() - begun, processor_seconds() - computed

    try:
        count = part.work(folder)
        results.put(part, count, *spent())
        print(f"{part.name}: {count.cases} cases, {len(count.failures)} failures", *count.failures[:5], sep="\n  ",
              flush=True)  # fmt: skip
    except Exception as error:  # a part that cannot be run is named in the table, and the others go on
        results.put(part, None, *spent(), reason(error)[:200])
        print(f"{part.name}: not run: {reason(error)}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the result file, which is gone on with")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone, such as kills or disk:real")
    parser.add_argument("--keep", action="store_true", help="also what an earlier commit counted without failure")
    options = parser.parse_args()
    leave_at_sigterm()
    os.chdir(ROOT)
    prepare_server()
    every = parts()
    results = Results(options.json, every, options.keep)
    wanted = [
        p for p in every if not options.parts or {p.name, p.kind, p.name.rpartition(":")[0]} & set(options.parts)
    ]
    left = [part for part in wanted if part.name not in results.done]
    left.sort(key=lambda part: DEAR.index(part.kind) + 1 if part.kind in DEAR else 0)
    if len(left) < len(wanted):
        print(f"going on with {', '.join(part.name for part in left)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as scratch:
        for part in left:
            attempt(part, results, Path(scratch))
    failed = {name: found for name, found in results.done.items() if found["failures"] or found["cases"] is None}
    for name, found in failed.items():
        wrong = found["failures"]
        print(f"{name}: {f'{len(wrong)} failures, the first: {wrong[0]}' if wrong else found['notes']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
