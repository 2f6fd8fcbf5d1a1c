"""Training and evaluating the runs of a table, shared among processes; each goes on from wherever it was stopped.

A run is claimed by the process that makes it, through a lock in its folder. The system takes back what a dead
process had claimed, also on another machine that shares the folder, and another process goes on with the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from mwpb_fast import data, train
from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.checkpoint import evaluate_run
from mwpb_fast.evaluation.request import Request
from mwpb_fast.reproduce.failures import Failures
from mwpb_fast.reproduce.plan import PlannedRun, read_results, result_key
from mwpb_fast.system import ranks
from mwpb_fast.system.files import to_json, write_atomically
from mwpb_fast.system.lock import exclusive

KEPT = ("accuracy", "interval", "norm", "eps", "parameters", "after", "warnings", "deviations", "seconds")


def execute(
    runs: Sequence[PlannedRun],
    *,
    quiet: bool = False,
    worker: bool = False,
    after: Callable[[dict[str, str]], object] = lambda failures: None,
) -> dict[str, str]:
    """Train and evaluate what is not finished; returns the failures, run name -> reason.

    A run that fails is reported and the others go on. after: called with the failures so far when a run is over.
    Several processes may work on the same runs: each is made by the one that claims it first. Who finds none
    left to claim helps with attacks, and waits for the others, to take over what one of them dies with; worker:
    leaves. What fails is not tried again by those at work, only by a later call; worker: which this one is not.
    Raises at once DataError where a data set is not there and ConfigError where an attack cannot run; and
    Interrupted after SIGTERM or SIGINT, with everything kept.
    """
    todo = [run for run in runs if run.state() != "done"]
    check(todo)
    found = Failures(runs, anew=not worker)
    names = {
        run.folder: f"{ranks.label()}[{number}/{len(todo)}] {run.name}:" for number, run in enumerate(todo, 1)
    }
    told: set[Path] = set()
    while True:
        ends: list[str] = []
        for run in [run for run in todo if not found.of(run)]:
            ends.append(_attempt(run, names[run.folder], quiet, found, told))
            if ends[-1] == "over":
                after(found.all())
                todo.remove(run)
        if "theirs" not in ends or (worker and "over" not in ends):
            return found.all()
        if "over" not in ends:
            for run in todo:
                _help(run)
            time.sleep(0.5)


def check(runs: Sequence[PlannedRun]) -> None:
    """Refuse, before anything is trained, a data set that is not there and an attack that cannot run on it."""
    by_set: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        by_set.setdefault((run.config.data.name, run.config.data.dir), []).append(run)
    for mine in by_set.values():
        classes = data.load_split(mine[0].config.data, "test").num_classes
        for name in dict.fromkeys(n for run in mine for _, e in run.missing() for n in e.attacks):
            find_attack(name).needs(classes)


def _attempt(
    run: PlannedRun, prefix: str, quiet: bool, found: Failures, told: set[Path]
) -> Literal["over", "theirs"]:
    """Do what is left of a run; `theirs` where another process has it."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(run.folder / "lock") as mine:
            if mine and not found.of(run):  # nor has it failed since it was looked at
                _run(run, prefix, quiet)
        if not mine and run.folder not in told:
            told.add(run.folder)
            print(f"{prefix} another process has it; to be looked at again", flush=True)
        return "over" if mine else "theirs"
    except Exception as error:  # whatever a row dies of, the others are worth having
        if os.environ.get("MWPB_DEBUG") == "1":
            traceback.print_exc()
        reason = " ".join(str(error).split()) or type(error).__name__
        found.add(run, reason)
        print(f"{prefix} FAILED: {reason}", flush=True)
        return "over"


def _run(run: PlannedRun, prefix: str, quiet: bool) -> None:
    def say(text: str) -> None:
        print(f"{prefix} {text}", flush=True)

    if not run.trained():
        say(f"training in {run.folder}")
        train.run(run.config, run.folder, quiet=quiet)
    for which, evaluation in run.missing():
        say(f"{which} checkpoint under {', '.join(evaluation.attacks)}")
        result = evaluate_run(_request(run, which, evaluation))
        _keep(run.folder, which, evaluation, result)
        say(", ".join(f"{name} {found['accuracy']:.2f} %" for name, found in result["attacks"].items()))


def _help(run: PlannedRun) -> None:
    """Attack what is left of the shards of a run that another process has; that one keeps the results, and tells
    what is wrong with them."""
    with contextlib.suppress(Exception):
        if run.trained():
            for which, evaluation in run.missing():
                evaluate_run(dataclasses.replace(_request(run, which, evaluation), show=False))


def _request(run: PlannedRun, which: str, evaluation: EvaluationConfig) -> Request:
    where, device = run.config.data.dir, run.config.precision.device
    return Request(run.folder, evaluation, which=which, data_dir=where, device=device)


def _keep(folder: Path, which: str, evaluation: EvaluationConfig, result: dict[str, Any]) -> None:
    results = read_results(folder)
    kept = results.setdefault(which, {})
    for name, found in result["attacks"].items():
        kept[result_key(name, evaluation)] = {
            "images": found["n"],
            **{key: found[key] for key in KEPT if key in found},
            "epoch": result["epoch"],
            "model_sha256": result["model_sha256"],
            "environment": result["environment"],
        }
    write_atomically(folder / "results.json", (to_json(results, indent=1) + "\n").encode())
