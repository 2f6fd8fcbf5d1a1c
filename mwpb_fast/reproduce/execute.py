"""Training and evaluating the runs of a table, one after another; each goes on from wherever it was stopped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mwpb_fast import data, train
from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluate import evaluate_run
from mwpb_fast.files import write_atomically
from mwpb_fast.reproduce.plan import Job, read_results, result_key
from mwpb_fast.signals import Interrupted

KEPT = ("accuracy", "interval", "seconds", "warnings", "after", "deviations")


def execute(
    jobs: Sequence[Job], *, quiet: bool = False, after: Callable[[dict[str, str]], object] = lambda failures: None
) -> dict[str, str]:
    """Train and evaluate what is not finished; returns the failures, job name -> reason.

    A job that fails is reported and the others go on. after: called with the failures so far when a job is over.
    Several processes may work on the same runs: each run is done by the one that comes first. Raises DataError
    at once where a data set is not there, and Interrupted after SIGTERM or SIGINT, with everything kept.
    """
    failures: dict[str, str] = {}
    todo = [job for job in jobs if job.state() != "done"]
    for config in {(job.config.data.name, job.config.data.dir): job.config.data for job in todo}.values():
        data.load_split(config, "test")
    for number, job in enumerate(todo, 1):
        say = Say(f"[{number}/{len(todo)}] {job.name}:", quiet)
        try:
            with _claimed(job.folder) as mine:
                if not mine:
                    raise BusyError("another process works on it")
                _run(job, say)
        except Interrupted:
            raise
        except Exception as error:  # whatever a row dies of, the others are worth having
            if os.environ.get("MWPB_DEBUG") == "1":
                traceback.print_exc()
            failures[job.name] = " ".join(str(error).split()) or type(error).__name__
            print(f"{say.prefix} FAILED: {failures[job.name]}", flush=True)
        after(failures)
    return failures


class BusyError(RuntimeError):
    """Another process has this run."""


class Say:
    """Lines about one job."""

    def __init__(self, prefix: str, quiet: bool) -> None:
        self.prefix, self.quiet = prefix, quiet

    def __call__(self, text: str) -> None:
        print(f"{self.prefix} {text}", flush=True)


def _run(job: Job, say: Say) -> None:
    if not job.trained():
        say(f"training in {job.folder}")
        train.run(job.config, job.folder, quiet=say.quiet)
    for which, evaluation in job.missing():
        say(f"{which} checkpoint under {', '.join(evaluation.attacks)}")
        result = evaluate_run(
            job.folder,
            evaluation,
            which=which,
            data_dir=job.config.data.dir,
            device=job.config.precision.device,
        )
        _keep(job.folder, which, evaluation, result)
        say(", ".join(f"{name} {found['accuracy']:.2f} %" for name, found in result["attacks"].items()))


def _keep(folder: Path, which: str, evaluation: EvaluationConfig, result: dict[str, Any]) -> None:
    results = read_results(folder)
    kept = results.setdefault(which, {})
    for name, found in result["attacks"].items():
        kept[result_key(name, evaluation)] = {
            "images": result["n"],
            **{key: found[key] for key in KEPT if key in found},
            "epoch": result["epoch"],
            "checkpoint_sha256": result["sha256"],
            "environment": result["environment"],
        }
    write_atomically(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether this process has the run's folder to itself; the system lets go of it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
