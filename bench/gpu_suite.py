"""Everything that is measured on a CUDA machine, in stages inside a few minutes, each of which leaves its JSON.

    python bench/gpu_suite.py --out bench/results/gpu --archive cifar10-jpeg.tar.xz

What would make the rest worthless comes first: the tests, in several processes, those of captured steps before
the others. What is timed follows in one process, the step before all else. A stage has its own time limit; one
that hangs or crashes costs itself and a start of that process, and time that is left over goes to the stages after
it. A stage writes its JSON as it goes, so one that crashes or is cut off leaves what it has done, with the reason
and with what is missing; one that crashes goes on after what made it crash, and the next run of the suite with
what is missing. A stage whose JSON is complete, by the same command, is not run again. What a stage cannot run for
want of a package it names in its JSON. Every log, with all tracebacks, stays beside the JSON, and after each stage
results.tar.gz holds all of it anew. At the end summary.json sets the figures beside their targets. Where there is
no git, MWPB_COMMIT says which commit it is. `--device cpu --quick` runs the same stages at toy size.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, circumstances, write_content, write_results
from record import read_content
from stages import SECONDS, STAGES, Stage
from targets import COLUMNS, summary
from together import Together, end

TAIL = 4000  # characters of a failed stage's output that are kept
PACKED = "results.tar.gz"


# one stage ----------------------------------------------------------------------------------------------------


def made_by(path: Path, command: list[str]) -> dict[str, Any]:
    """What the JSON holds, if this command wrote it."""
    content = read_content(path)
    return content if content.get("suite_command", content.get("command")) == shlex.join(command) else {}


def complete(path: Path, command: list[str]) -> bool:
    """Whether the JSON is whole, of no failed stage, and made by this command."""
    content = made_by(path, command)
    return bool(content) and not {"failed", "unfinished"} & set(content)


def run_process(words: list[str], limit: float, log: Path, environment: dict[str, str]) -> str:
    """Run Python with these words, its output appended to `log`; why it failed, or nothing. After `limit` seconds
    the process and all that it started are ended."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"cut off after {limit:.0f} s"
        finally:  # also at Ctrl-C; nothing outlives its stage
            end(process)
    return "" if code == 0 else f"ended with {code}"


def run_until_stuck(words: list[str], out: Path, limit: float, log: Path, together: Together) -> str:
    """Run it, again after a crash that left its JSON further than it was: then it goes on there."""
    finish, command = time.monotonic() + limit, ["python", *words]

    def progress() -> tuple[Any, ...]:
        content = made_by(out, command)
        return content.get("unfinished"), content.get("skipped")

    while True:
        before = progress()
        left = finish - time.monotonic()
        if words[0] == "-m":
            failure = run_process(words, left, log, together.environment)
        else:
            failure = together.run(words, left, log)
        after = progress()
        on = failure.startswith("ended") and after[0] and after != before
        if not on or finish - time.monotonic() < 1:
            return failure


def run_stage(stage: Stage, o: argparse.Namespace, share: float, limit: float, together: Together) -> str:
    """Run a stage where it must be; what became of it, in one word and its reason."""
    out = o.out / f"{stage.name}.json"
    words = stage.words(o, share, out)
    command = ["python", *words]
    if complete(out, command):
        return "complete before"
    missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if missing:
        columns = [("skipped", "skipped", "")]
        row = {"skipped": f"{', '.join(missing)} not installed"}
        write_results(out, torch.device(o.device), columns, [row], suite_command=shlex.join(command))
        return f"skipped: {row['skipped']}"
    log, started = out.with_suffix(".log"), time.monotonic()
    out.with_suffix(".xml").unlink(missing_ok=True)  # of an earlier run
    failure = run_until_stuck(words, out, limit, log, together)
    if stage.finish is not None:
        cut = "cut off" in failure
        try:
            stage.finish(command, out, o, cut)
            failure = failure if cut else ""  # tests that fail are a result
        except (OSError, ElementTree.ParseError) as error:
            failure = failure or f"left no result: {error}"
    content = made_by(out, command)
    stale = "failed" in content  # a command that came to write its JSON leaves no such word
    if not failure and (stale or not content):
        failure = "left no result"
    left = content.get("unfinished", [])
    without = f"; without {', '.join(left)}" if left else ""
    if failure:
        if not content or (stale and not left):
            content = {**circumstances(torch.device(o.device)), "suite_command": shlex.join(command)}
            content |= {"columns": [["failed", "failed", ""]], "rows": [{"failed": failure}]}
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        write_content(out, content | {"failed": failure, "seconds": time.monotonic() - started, "tail": tail})
        return f"failed: {failure}{without}"
    skipped = content.get("skipped")
    named = f"; skipped {', '.join(skipped)}" if skipped else ""
    return f"done in {time.monotonic() - started:.0f} s{without}{named}"


def surroundings(device: str) -> dict[str, str]:
    """The environment of the stages' processes."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # a crash leaves its traceback in the log
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def summed_up(o: argparse.Namespace, found: dict[str, str]) -> list[dict[str, Any]]:
    """The figures beside their targets, written with what became of each stage, and all of it packed."""
    device = torch.device(o.device)
    rows = summary(o.out, device.type)
    write_results(o.out / "summary.json", device, COLUMNS, rows, stages=found)
    pack(o.out)
    return rows


def pack(folder: Path) -> None:
    """All that the folder holds, in one archive in it. It appears whole or not at all."""
    temporary = folder / f".{PACKED}.tmp"
    with tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.is_file() and PACKED not in path.name:
                archive.add(path, path.name)
    temporary.replace(folder / PACKED)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "--stages", nargs="*", default=names, choices=names, metavar="STAGE", help=", ".join(names)
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", help="folder of the JSON")
    parser.add_argument("--budget", type=float, default=SECONDS, help="seconds for all of it")
    parser.add_argument(
        "--archive",
        type=Path,
        help="cifar10-jpeg.tar.xz, for real images, else digits; beside it tinyimagenet*.tar*, for the loaders",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the suite itself")
    o = parser.parse_args(arguments)
    if o.device != "cpu" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --device cpu --quick tries the suite without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`, which ends the stage
    o.out = o.out.resolve()
    o.archive = o.archive.resolve() if o.archive else None
    o.out.mkdir(parents=True, exist_ok=True)
    until, whole = time.monotonic() + o.budget, sum(stage.weight for stage in STAGES)
    found: dict[str, str] = {}
    rows = summed_up(o, found)
    spare, together = 0.0, Together(ROOT, surroundings(o.device))
    try:
        for stage in (s for s in STAGES if s.name in o.stages):
            share = o.budget * stage.weight / whole
            started = time.monotonic()
            limit = min(share + spare, until - started)
            out_of_time = "not begun: out of time"
            found[stage.name] = run_stage(stage, o, share, limit, together) if limit > 1 else out_of_time
            spare = max(0.0, spare + share - (time.monotonic() - started))
            print(f"{stage.name:12s} {found[stage.name]}", flush=True)
            rows = summed_up(o, found)
    finally:
        together.close()
    for row in rows:
        print(f"{row['row']:70s} target {row['target']:>8s}  measured {row['measured']}  {row['met']}")
    return int(any(word.startswith(("failed", "not begun")) for word in found.values()))


if __name__ == "__main__":
    sys.exit(main())
