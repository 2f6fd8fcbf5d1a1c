"""What is promised of runs that are killed, disks that fail and input that is hostile, tried at length.

Each part is tried and written into the result file before the next; the same command on the same commit, versions
and device goes on with those that are left. docs/reliability.md has its table; what was not run stands there too.

    make torture
    python bench/torture.py --json bench/results/torture.json --parts kills disk
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torture_files as files
import torture_kills as kills
from measure import ROOT, circumstances, reason, write_content
from record import leave_at_sigterm, read_content
from torture_child import prepare_server, run
from torture_kills import Count

AUTOATTACK = ["evaluate", "--attacks=aa", "--subset=6", "--eps=32/255", "--batch-size=6"]
ALL = ("-m", "slow or not slow")
COLUMNS = [
    ["promise", "promise", ""],
    ["tried", "tried by", ""],
    ["cases", "cases", ",d"],
    ["failures", "failures", "d"],
    ["minutes", "minutes", ".1f"],
    ["notes", "", ""],
]


@dataclass(frozen=True)
class Part:
    """name: of the part; what stands before a colon may be asked for alone. promise, tried: its row of the table,
    which parts with the same of both share. work: from an empty folder to what it counted."""

    name: str
    promise: str
    tried: str
    work: Callable[[Path], Count]


def pytest(*words: str) -> Callable[[Path], Count]:
    """A part of the test suite, on two processes where there is more than a file: each test is a case."""

    def work(folder: Path) -> Count:
        named = [word for word in words if word.startswith("tests/")]
        found = [path for word in named for path in ([word] if "::" in word else map(str, ROOT.glob(word)))]
        if not found:
            raise FileNotFoundError(f"no {' '.join(named)}")
        options = [word for word in words if word not in named]
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "load"]
        command += [*found, *options, f"--junitxml={report}", f"--basetemp={folder / 'tests'}"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
        if not report.exists():
            raise RuntimeError(f"pytest: {(ended.stdout + ended.stderr).strip()[-300:]}")
        count = Count()
        skipped = 0
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = [child for child in case if child.tag in ("failure", "error")]
            skipped += any(child.tag == "skipped" for child in case)
            properties = {p.get("name"): p.get("value") for p in case.iter("property")}
            count.cases += int(properties.get("cases") or 1)
            count.failures += [f"{case.get('name')}: {(child.get('message') or '')[:200]}" for child in wrong]
        count.cases -= skipped
        count.notes = f"{skipped} skipped" if skipped else ""
        if ended.returncode not in (0, 1):
            count.failures.append(f"pytest ended with {ended.returncode}")
        return count

    return work


def with_run(work: Callable[[Path, Path], Count]) -> Callable[[Path], Count]:
    """`work` with a trained run to work on."""

    def working(folder: Path) -> Count:
        trained = folder / "trained"
        run([*kills.TRAIN, "--epochs=3", f"--out={trained}"], folder / "training")
        return work(trained, folder)

    return working


def parts() -> list[Part]:
    """All of them, the quick ones first."""
    again = "the same command comes to the bytes of a run that nobody disturbed"
    dies = "a process may die at any moment"
    leaves = "a signal is heeded: status, 20 seconds, and going on"
    damage = "damage is noticed"
    hostile = "hostile input does nothing but end in one line"
    share = "two processes on one folder do no harm"
    fails = "a disk may fail: one line, status 1, the state before whole"

    def kill(phase: str, count: int, seed: int) -> Callable[[Path], Count]:
        return lambda folder: kills.killed(kills.training(), phase, count, folder, seed)

    def on_evaluation(blow: Callable[..., Count], *more: Any, words: Any = kills.EVALUATE, **seed: int) -> Any:
        def work(run: Path, folder: Path) -> Count:
            return blow(kills.evaluation(run, words), "evaluation", *more, folder=folder, **seed)

        return with_run(work)

    def on_preparation(blow: Callable[..., Count], *more: Any, **seed: int) -> Callable[[Path], Count]:
        def work(folder: Path) -> Count:
            images = kills.write_images(folder / "images")
            return blow(kills.preparation(images), *more, folder=folder, **seed)

        return work

    def evaluations_together(run: Path, folder: Path) -> Count:
        return kills.together(kills.evaluation(run), "another process", 5, folder)

    found = [
        *(Part(f"kills:{phase}:{seed}", dies, f"kill -9 {when}; {again}", kill(phase, 5, seed))
          for phase, when, times in (("training", "in training", 5), ("validation", "in validation", 4),
                                     ("writing", "while a checkpoint is written", 5))
          for seed in range(times)),
        *(Part(f"kills:evaluation:{seed}", dies, f"kill -9 in evaluation; {again}",
               on_evaluation(kills.killed, 5, seed=seed)) for seed in range(3)),
        *(Part(f"kills:preparation:{seed}", dies, "kill -9 while a data set is prepared: none, or a whole one",
               on_preparation(kills.killed, "preparation", 5, seed=seed)) for seed in range(3)),
        Part("signals:training", leaves, "SIGTERM, SIGINT, SIGHUP, SIGUSR1 in training",
             lambda folder: kills.signalled(kills.training(), "training", folder)),
        Part("signals:validation", leaves, "the same in validation",
             lambda folder: kills.signalled(kills.training(), "validation", folder)),
        Part("signals:writing", leaves, "the same while a checkpoint is written",
             lambda folder: kills.signalled(kills.training(), "writing", folder)),
        Part("signals:evaluation", leaves, "the same in PGD", on_evaluation(kills.signalled)),
        Part("signals:autoattack", leaves, "the same in AutoAttack",
             on_evaluation(kills.signalled, words=AUTOATTACK)),
        Part("signals:preparation", leaves, "the same while a data set is prepared",
             on_preparation(kills.signalled, "preparation")),
        Part("together:training", share, "the second at a random moment: training",
             lambda folder: kills.together(kills.training(), "another process", 10, folder)),
        Part("together:evaluation", share, "evaluation",
             with_run(evaluations_together)),
        Part("together:preparation", share, "preparation",
             on_preparation(lambda task, *more, folder: kills.together(task, "another process", 5, folder))),
        Part("damage:checkpoint", damage,
             "each region of a checkpoint and its checksum: named, the one before used",
             lambda folder: files.checkpoints(97, folder)),
        Part("damage:shard", damage, "each region of an evaluation's shards: done again",
             lambda folder: files.shards(50, folder)),
        Part("damage:prepared", damage, "each region of a prepared set: refused by name",
             lambda folder: files.prepared(60, folder)),
        Part("disk:injected", fails, "full, not permitted, read-only, gone, over quota or broken from a write on",
             lambda folder: files.failing_disk(24, folder)),
        Part("disk:real", fails, "a file system that is full or becomes read-only", files.real_disk),
        Part("guards", "what goes wrong in training is named", "divergence, collapse, NaN, hangs",
             pytest("tests/test_guards.py", "tests/test_run_faults.py", "tests/test_train_ends.py", *ALL)),
        Part("frozen", "files of every release are read", "a run of 0.1.0 goes on, is evaluated and drawn",
             pytest("tests/test_frozen.py")),
        Part("hostile:archives", hostile, "archives: paths that climb, links, devices, bombs, truncated, corrupt",
             pytest("tests/test_data_archive.py")),
        Part("hostile:pickles", hostile, "pickles and weight files: code, other types, damage",
             pytest("tests/test_model_files.py", "tests/test_checkpoint.py", "tests/test_field_files.py",
                    "-m", "not slow")),
        Part("hostile:data", hostile, "images, .mat files, descriptions of data sets",
             pytest("tests/test_data_images.py", "tests/test_data_sets.py", "tests/test_data_prepared.py",
                    "tests/test_data_cifar.py", "-m", "not slow")),
        Part("hostile:damage", hostile, "images, .mat files and archives damaged at random",
             pytest("tests/test_hostile.py", *ALL, "-k", "damaged")),
        Part("hostile:configurations", hostile, "configurations: YAML and words of the command line",
             pytest("tests/test_config.py", "tests/test_values.py", "tests/test_cli.py")),
        Part("hostile:options", hostile, "every option with absurd values",
             pytest("tests/test_hostile.py", *ALL, "-k", "absurd")),
        Part("ranks", "1, 2 and 4 ranks give the same; a rank may die; N go on as M", "torchrun, gloo",
             pytest("tests/test_distributed*.py", *ALL)),
        Part("sanitizers", "native code stays in its tensors", "the op tests under AddressSanitizer and UBSan",
             pytest("tests/ops/test_native_levels.py", "-m", "slow", "-k", "sanitizers")),
        Part("fuzz", "ops equal their reference on anything", "10,000 cases an op: sizes, layouts, NaN, labels",
             pytest("tests/ops/test_fuzz.py", "-m", "slow")),
        Part("large", "ops equal their reference on anything", "more than 2^31 elements",
             pytest("tests/ops/test_large.py", *ALL, "-n", "1")),
    ]  # fmt: skip
    return found


class Results:
    """The result file. done: by part, what it counted; failed parts could not be tried."""

    def __init__(self, path: Path | None, every: list[Part]) -> None:
        self.path, self.every, self.about = path, every, circumstances(torch.device("cpu"))
        self.lock = threading.Lock()
        found = read_content(path)
        same = all(found.get(key) == self.about[key] for key in ("device", "versions", "commit"))
        self.done: dict[str, dict[str, Any]] = found.get("done", {}) if same else {}

    def put(self, part: Part, count: Count | None, seconds: float, problem: str = "") -> None:
        with self.lock:
            self.done[part.name] = {
                "cases": count.cases if count else None, "failures": count.failures if count else [],
                "seconds": seconds, "notes": count.notes if count else f"not run: {problem}",
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
            if left := len(names) - len(found):
                notes.append(f"not run: {left} of {len(names)} parts" if found else "not run")
            rows.append({
                "promise": promise if promise != before else "", "tried": tried,
                "cases": sum(one["cases"] for one in counted) if counted else None,
                "failures": len(failures) if counted else None,
                "minutes": sum(one["seconds"] for one in found) / 60 if found else None,
                "notes": "; ".join(" ".join(note.split()) for note in (*notes, *failures[:3])),
            })  # fmt: skip
            before = promise
        return rows


def attempt(part: Part, results: Results, scratch: Path) -> None:
    folder = scratch / part.name.replace(":", "-")
    folder.mkdir()
    print(f"{part.name}: begun", flush=True)
    begun = time.monotonic()
    try:
        count = part.work(folder)
        results.put(part, count, time.monotonic() - begun)
        print(f"{part.name}: {count.cases} cases, {len(count.failures)} failures", *count.failures[:5], sep="\n  ",
              flush=True)  # fmt: skip
    except Exception as error:  # a part that cannot be run is named in the table, and the others go on
        results.put(part, None, time.monotonic() - begun, reason(error)[:200])
        print(f"{part.name}: not run: {reason(error)}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the result file, which is gone on with")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone, such as kills or disk:real")
    options = parser.parse_args()
    leave_at_sigterm()
    os.chdir(ROOT)
    prepare_server()
    every = parts()
    results = Results(options.json, every)
    wanted = [
        p
        for p in every
        if not options.parts or {p.name, p.name.partition(":")[0], p.name.rpartition(":")[0]} & set(options.parts)
    ]
    left = [part for part in wanted if part.name not in results.done]
    if len(left) < len(wanted):
        print(f"going on with {', '.join(part.name for part in left)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as scratch:
        for part in left:
            attempt(part, results, Path(scratch))
    failed = {name: found["failures"] for name, found in results.done.items() if found["failures"]}
    for name, failures in failed.items():
        print(f"{name}: {len(failures)} failures, the first: {failures[0]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
