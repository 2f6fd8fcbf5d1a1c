"""Training and evaluating the runs of a table, one after another; each goes on from wherever it was stopped."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mwpb_fast import data, train
from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.checkpoint import evaluate_run
from mwpb_fast.evaluation.request import Request
from mwpb_fast.reproduce.plan import PlannedRun, read_results, result_key
from mwpb_fast.system.files import to_json, write_atomically
from mwpb_fast.system.lock import exclusive

KEPT = ("accuracy", "interval", "norm", "eps", "parameters", "after", "warnings", "deviations", "seconds")


def execute(
    runs: Sequence[PlannedRun],
    *,
    quiet: bool = False,
    after: Callable[[dict[str, str]], object] = lambda failures: None,
) -> dict[str, str]:
    """Train and evaluate what is not finished; returns the failures, run name -> reason.

    A run that fails is reported and the others go on. after: called with the failures so far when a run is over.
    Several processes may work on the same runs: each run is done by the one that comes first, and waited for by
    the others in the end. Raises at once DataError where a data set is not there and ConfigError where an attack
    cannot run; and Interrupted after SIGTERM or SIGINT, with everything kept.
    """
    failures: dict[str, str] = {}
    todo = [run for run in runs if run.state() != "done"]
    _check(todo)
    names = {run.folder: f"[{number}/{len(todo)}] {run.name}:" for number, run in enumerate(todo, 1)}
    elsewhere = []
    for run in todo:
        if not _attempt(run, names[run.folder], quiet, failures, wait=False):
            elsewhere.append(run)
        after(failures)
    for run in elsewhere:
        _attempt(run, names[run.folder], quiet, failures, wait=True)
        after(failures)
    return failures


def _check(runs: Sequence[PlannedRun]) -> None:
    """Refuse, before anything is trained, a data set that is not there and an attack that cannot run on it."""
    by_set: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        by_set.setdefault((run.config.data.name, run.config.data.dir), []).append(run)
    for mine in by_set.values():
        classes = data.load_split(mine[0].config.data, "test").num_classes
        for name in dict.fromkeys(n for run in mine for _, e in run.missing() for n in e.attacks):
            find_attack(name).needs(classes)


def _attempt(run: PlannedRun, prefix: str, quiet: bool, failures: dict[str, str], *, wait: bool) -> bool:
    """Do what is left of a run; False where another process has it, unless it is to be waited for."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(run.folder / "lock", wait=wait) as mine:
            if mine:
                _run(run, prefix, quiet)
            else:
                print(f"{prefix} another process has it; to be looked at again", flush=True)
            return mine
    except Exception as error:  # whatever a row dies of, the others are worth having
        if os.environ.get("MWPB_DEBUG") == "1":
            traceback.print_exc()
        failures[run.name] = " ".join(str(error).split()) or type(error).__name__
        print(f"{prefix} FAILED: {failures[run.name]}", flush=True)
        return True


def _run(run: PlannedRun, prefix: str, quiet: bool) -> None:
    def say(text: str) -> None:
        print(f"{prefix} {text}", flush=True)

    if not run.trained():
        say(f"training in {run.folder}")
        train.run(run.config, run.folder, quiet=quiet)
    for which, evaluation in run.missing():
        say(f"{which} checkpoint under {', '.join(evaluation.attacks)}")
        where, device = run.config.data.dir, run.config.precision.device
        result = evaluate_run(Request(run.folder, evaluation, which=which, data_dir=where, device=device))
        _keep(run.folder, which, evaluation, result)
        say(", ".join(f"{name} {found['accuracy']:.2f} %" for name, found in result["attacks"].items()))


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
