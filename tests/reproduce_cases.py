"""Runs of a table as training and evaluation leave them, with made-up numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mwpb_fast.config import to_dict
from mwpb_fast.reproduce.plan import PlannedRun, plan_runs, read_results, result_key
from mwpb_fast.reproduce.tables import find_table


def runs_of(
    name: str, out: Path, rows: str = "", seeds: int = 3, overrides: tuple[str, ...] = ()
) -> list[PlannedRun]:
    return plan_runs(find_table(name), [r for r in rows.split(",") if r], seeds, out, overrides)


def fake_training(run: PlannedRun, radii: list[float], best: int = 90) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(run.config)))
    with (run.folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, run.config.epochs + 1):
            record = {"epoch": epoch, "radius_min": 0.01, "radius_mean": epoch / 1000, "radius_max": 0.05}
            file.write(json.dumps(record) + "\n")
    content = {"epoch": best, "budget": to_dict(run.config)["budget"], "radii": radii}
    (run.folder / "radii.json").write_text(json.dumps(content))


def fake_evaluation(run: PlannedRun, which: str, accuracies: Mapping[str, float]) -> None:
    """accuracies: of the attacks of the run's evaluations of that checkpoint; others are left out."""
    results = read_results(run.folder)
    for kind, evaluation in run.evaluations:
        for attack in evaluation.attacks:
            if kind == which and attack in accuracies:
                kept = results.setdefault(which, {})
                kept[result_key(attack, evaluation)] = {"accuracy": accuracies[attack], "images": 10000}
    (run.folder / "results.json").write_text(json.dumps(results))


def natural(run: PlannedRun, best: float, last: float | None = None) -> None:
    """A trained run with its natural accuracies."""
    fake_training(run, [0.02, 0.03, 0.055])
    fake_evaluation(run, "best", {"natural": best})
    if last is not None:
        fake_evaluation(run, "last", {"natural": last})


def until(ready: Callable[[], Any]) -> None:
    """Wait for what another process does."""
    for _ in range(20000):
        if ready():
            return
        time.sleep(0.01)
    raise AssertionError("it took too long")
