"""Everything that is measured on a CUDA machine, in stages inside a few minutes, each of which leaves its JSON.

    python bench/gpu_suite.py --out bench/results/gpu --archive cifar10-jpeg.tar.xz

A stage is a process of its own with its own time limit, so that a crash or a hang costs only it; time that is
left over goes to the stages after it. A stage whose JSON is complete, by the same command, is not run again; one
that failed or was cut off is. What a stage cannot run for want of a package it names in its JSON. At the end
summary.json sets the figures beside their targets. `--device cpu --quick` runs the same stages at toy size.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import ROOT, circumstances, write_results
from targets import COLUMNS, summary

TAIL = 4000  # characters of a failed stage's output that are kept


@dataclass(frozen=True)
class Stage:
    """name: of the stage and its JSON. weight: its part of the time. needs: packages without which it is
    skipped. words: from the options, its seconds and its JSON to its command. finish: makes the JSON where the
    command does not."""

    name: str
    weight: float
    words: Callable[[argparse.Namespace, float, Path], list[str]]
    needs: tuple[str, ...] = ()
    finish: Callable[[list[str], Path, argparse.Namespace], None] | None = None


def shown(path: Path) -> str:
    """A path from the checkout's root, where every stage runs; so it stands in the result files."""
    return os.path.relpath(path, ROOT)


def script(name: str, full: str, quick: str, seconds: float = 0.6) -> Callable[..., list[str]]:
    """The command of a script in this folder. {budget} in its words is `seconds` of the stage's own."""

    def words(o: argparse.Namespace, limit: float, out: Path) -> list[str]:
        text = (quick if o.quick else full).format(budget=round(seconds * limit))
        named: list[str] = []
        if o.archive and "{archive}" in text:
            named = ["--archive", shown(o.archive)]
        if o.archive and "{shared}" in text:
            named = ["--shared", shown(o.archive.parent)]
        text = text.replace("{archive}", "").replace("{shared}", "")
        device = [] if name == "kernels" else ["--device", o.device]
        return [f"bench/{name}.py", *text.split(), *named, *device, "--json", shown(out)]

    return words


def pytest_words(o: argparse.Namespace, limit: float, out: Path) -> list[str]:
    which = ["tests/test_bench_tables.py"] if o.quick else ["-m", "gpu", "tests"]
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-q"]
    return ["-m", "pytest", *options, *which, f"--junitxml={shown(out.with_suffix('.xml'))}"]


def pytest_result(command: list[str], out: Path, o: argparse.Namespace) -> None:
    """The tests' counts and the names of those that failed, from pytest's own report."""
    report = out.with_suffix(".xml")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    kinds = {kind: [c for c in cases if c.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    bad = [f"{c.get('classname')}::{c.get('name')}" for kind in ("failure", "error") for c in kinds[kind]]
    row = {"tests": len(cases), "skipped": len(kinds["skipped"]), "failed": len(bad), "names": bad}
    row["passed"] = row["tests"] - row["skipped"] - row["failed"]
    columns = [(k, k, "d") for k in ("tests", "passed", "skipped", "failed")]
    write_results(out, torch.device(o.device), columns, [row], suite_command=shlex.join(command))
    report.unlink()


TINY = "--model smallresnet-2 --batch 4 --rounds 1"
STAGES = (
    Stage("tests", 60, pytest_words, needs=("pytest",), finish=pytest_result),
    Stage(
        "train",
        110,
        script("train", "--batch 128 --rounds 7 --tune --budget {budget}", f"{TINY} --size 8 --no-compile"),
    ),
    Stage(
        "attack",
        75,
        script(
            "attack",
            "--compile --tune --rounds 7 --budget {budget} --only mwpb TRADES torchattacks",
            f"{TINY} --size 8 --steps 1 --only mwpb TRADES",
        ),
    ),
    Stage(
        "kernels",
        65,
        script(
            "kernels",
            "--rounds 15 --budget 0.5 --compile-seconds {budget}",
            "margin linf_step_ --rounds 3 --budget 0.1 --no-compile",
        ),
    ),
    Stage(
        "training",
        75,
        script(
            "short_training",
            "{{archive}} --epochs 4",
            "--epochs 1 --subset 128 --test-images 20 --model smallresnet-2",
        ),
    ),
    Stage(
        "equivalence",
        70,
        script(
            "equivalence",
            "{{archive}}",
            "--train-model smallresnet-2 --train-steps 2 --train-batch 4 --attack-steps 1 --per-class 1 "
            "--eps 8 --objectives at --seeds 2 --no-weights",
        ),
    ),
    Stage(
        "loaders",
        30,
        script(
            "loaders",
            "{{shared}} --rounds 2 --seconds 1 --sets tinyimagenet",
            "--sets --random 64 --model smallresnet-2 --batch 4 --steps 1 --rounds 1 --seconds 0.1",
        ),
    ),
    Stage(
        "train-wrn",
        45,
        script(
            "train",
            "--recipes table2.mwpb_at --batch 128 --rounds 3 --steps 4 --no-compile --tune --budget {budget}",
            f"--recipes table2.mwpb_at {TINY} --size 8 --no-compile",
        ),
    ),
    Stage(
        "roofline",
        10,
        script("roofline", "--rounds 5 --budget 0.2", f"{TINY} --size 8 --budget 0.1"),
    ),
)


# one stage ----------------------------------------------------------------------------------------------------


def complete(path: Path, command: list[str]) -> bool:
    """Whether the JSON is whole, of no failed stage, and made by this command."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    made_by = content.get("suite_command", content.get("command"))
    return "failed" not in content and made_by == shlex.join(command)


def run_process(words: list[str], limit: float, log: Path, environment: dict[str, str]) -> str:
    """Run Python with these words, its output in `log`; why it failed, or nothing. After `limit` seconds the
    process and all that it started are ended."""
    with log.open("w") as file:
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
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "" if code == 0 else f"ended with {code}"


def run_stage(stage: Stage, o: argparse.Namespace, share: float, limit: float) -> str:
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
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    if o.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log, started = out.with_suffix(".log"), time.monotonic()
    failure = run_process(words, limit, log, environment)
    if stage.finish is not None and "cut off" not in failure:
        try:
            stage.finish(command, out, o)
            failure = ""  # tests that fail are a result
        except (OSError, ElementTree.ParseError) as error:
            failure = failure or f"left no result: {error}"
    if not failure and not complete(out, command):
        failure = "left no result"
    if failure:
        content = {
            **circumstances(torch.device(o.device)),
            "failed": failure,
            "seconds": time.monotonic() - started,
            "tail": log.read_text(errors="replace")[-TAIL:],
            "columns": [["failed", "failed", ""]],
            "rows": [{"failed": failure}],
        }
        out.write_text(json.dumps(content, indent=1) + "\n")
        return f"failed: {failure}"
    log.unlink()
    return f"done in {time.monotonic() - started:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "--stages", nargs="*", default=names, choices=names, metavar="STAGE", help=", ".join(names)
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", help="folder of the JSON")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for all of it")
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
    end, whole = time.monotonic() + o.budget, sum(stage.weight for stage in STAGES)
    found: dict[str, str] = {}
    spare = 0.0
    for stage in (s for s in STAGES if s.name in o.stages):
        share = o.budget * stage.weight / whole
        started = time.monotonic()
        limit = min(share + spare, end - started)
        found[stage.name] = run_stage(stage, o, share, limit) if limit > 1 else "not begun: out of time"
        spare = max(0.0, spare + share - (time.monotonic() - started))
        print(f"{stage.name:12s} {found[stage.name]}", flush=True)
    rows = summary(o.out, torch.device(o.device).type)
    write_results(o.out / "summary.json", torch.device(o.device), COLUMNS, rows, stages=found)
    for row in rows:
        print(f"{row['row']:70s} target {row['target']:>8s}  measured {row['measured']}  {row['met']}")
    return int(any(word.startswith(("failed", "not begun")) for word in found.values()))


if __name__ == "__main__":
    sys.exit(main())
