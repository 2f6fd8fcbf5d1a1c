"""Runs of a table as training and evaluation leave them, with made-up numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from mwpb_fast.config import to_dict
from mwpb_fast.reproduce.plan import Job, make_jobs, read_results, result_key
from mwpb_fast.reproduce.tables import find_table


def jobs_of(name: str, out: Path, rows: str = "", seeds: int = 3, overrides: tuple[str, ...] = ()) -> list[Job]:
    return make_jobs(find_table(name), [r for r in rows.split(",") if r], seeds, out, overrides)


def fake_training(job: Job, radii: list[float], best: int = 90) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(job.config)))
    with (job.folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, job.config.epochs + 1):
            record = {"epoch": epoch, "radius_min": 0.01, "radius_mean": epoch / 1000, "radius_max": 0.05}
            file.write(json.dumps(record) + "\n")
    content = {"epoch": best, "budget": to_dict(job.config)["budget"], "radii": radii}
    (job.folder / "radii.json").write_text(json.dumps(content))


def fake_evaluation(job: Job, which: str, accuracies: Mapping[str, float]) -> None:
    """accuracies: of the attacks of the job's evaluations of that checkpoint; others are left out."""
    results = read_results(job.folder)
    for kind, evaluation in job.evaluations:
        for attack in evaluation.attacks:
            if kind == which and attack in accuracies:
                kept = results.setdefault(which, {})
                kept[result_key(attack, evaluation)] = {"accuracy": accuracies[attack], "images": 10000}
    (job.folder / "results.json").write_text(json.dumps(results))


def natural(job: Job, best: float, last: float | None = None) -> None:
    """A trained run with its natural accuracies."""
    fake_training(job, [0.02, 0.03, 0.055])
    fake_evaluation(job, "best", {"natural": best})
    if last is not None:
        fake_evaluation(job, "last", {"natural": last})
