"""From run folders to the numbers of a table: mean and sample standard deviation over seeds, differences."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from mwpb_fast.log import read_records
from mwpb_fast.reproduce.plan import Job, changes, read_results, result_key
from mwpb_fast.reproduce.tables import Column, Row, Table

FORMAT = 1
CHECKPOINTS = ("best", "last")


def gather(table: Table, jobs: Sequence[Job], failures: dict[str, str] | None = None) -> dict[str, Any]:
    """Everything about a table, in plain types; numbers that are not there are None, never guessed.

    In each cell: `paper`; for each checkpoint `mean`, `std` (sample standard deviation; None for fewer than two
    seeds), `values` by seed, `difference` to the paper, and `control`: mean and standard deviation of the
    differences to the control row, seed by seed, over the seeds that both have.
    """
    rows = [row for row in table.rows if any(job.row == row for job in jobs)]
    columns = _columns(table, jobs)
    mine = {row.name: [job for job in jobs if job.row == row] for row in rows}
    values = {
        (row.name, column.key): {which: _by_seed(mine[row.name], column, which) for which in CHECKPOINTS}
        for row in rows
        for column in columns
    }
    return {
        "format": FORMAT,
        "table": table.name,
        "title": table.title,
        "notes": list(table.notes),
        "changes": changes(jobs),
        "seeds": sorted({job.config.seed for job in jobs}),
        "images": _images(jobs),
        "axis": table.axis,
        "columns": [{"key": column.key, "label": column.label, "digits": column.digits, "x": column.x}
                    for column in columns],
        "rows": [
            {
                "row": row.name,
                "label": row.label,
                "x": row.x,
                "figure": f"figure{row.figure}" if row.figure else "",
                "recipe": mine[row.name][0].config.recipe,
                "control": row.control if row.control in mine else None,
                "runs": [_run(job, failures or {}) for job in mine[row.name]],
                "cells": {column.key: _cell(table, row, column, values) for column in columns},
            }
            for row in rows
        ],
    }  # fmt: skip


def statistics(values: Sequence[float]) -> dict[str, Any]:
    """Number, mean and sample standard deviation (n - 1); None where there are too few values for it."""
    n = len(values)
    mean = math.fsum(values) / n if n else None
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if mean is not None and n > 1 else None
    return {"n": n, "mean": mean, "std": std}


def _cell(
    table: Table, row: Row, column: Column, values: dict[tuple[str, str], dict[str, dict[int, float]]]
) -> dict[str, Any]:
    paper = table.numbers.get(row.name, {}).get(column.key)
    cell: dict[str, Any] = {"paper": paper}
    for which in CHECKPOINTS:
        ours = values[row.name, column.key][which]
        found = statistics(list(ours.values()))
        mean = found["mean"]
        found["difference"] = None if mean is None or paper is None else mean - paper
        theirs = values.get((row.control, column.key), {}).get(which, {})
        found["control"] = statistics([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
        cell[which] = found | {"values": {str(seed): value for seed, value in ours.items()}}
    return cell


def _columns(table: Table, jobs: Sequence[Job]) -> list[Column]:
    """The table's columns, and one more for each attack that was asked for besides."""
    asked = dict.fromkeys(name for job in jobs for _, e in job.evaluations for name in e.attacks)
    known = {column.attack for column in table.columns}
    extra = [Column(key=name, label=name, attack=name) for name in asked if name not in known]
    return [*table.columns, *extra]


def _by_seed(jobs: Sequence[Job], column: Column, which: str) -> dict[int, float]:
    found = {job.config.seed: _value(job, column, which) for job in jobs}
    return {seed: value for seed, value in found.items() if value is not None}


def _value(job: Job, column: Column, which: str) -> float | None:
    if job.foreign():
        return None
    if column.source == "attack":
        results = read_results(job.folder).get(which, {})
        for checkpoint, evaluation in job.evaluations:
            if checkpoint == which and column.attack in evaluation.attacks:
                result = results.get(result_key(column.attack, evaluation))
                return None if result is None else float(result["accuracy"])
        return None
    radii = _radii(job)
    if radii is None:
        return None
    if column.source == "radii":
        if which != "best":
            return None
        values = radii["radii"]
        return {"min": min(values), "mean": math.fsum(values) / len(values), "max": max(values)}[column.attack]
    epoch = radii["epoch"] if which == "best" else job.config.epochs
    records = {record["epoch"]: record for record in read_records(job.folder / "metrics.jsonl")}
    value = records.get(epoch, {}).get(f"radius_{column.attack}")
    return None if value is None else float(value)


def _radii(job: Job) -> dict[str, Any] | None:
    try:
        content = json.loads((job.folder / "radii.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("radii") else None


def _run(job: Job, failures: dict[str, str]) -> dict[str, Any]:
    radii = _radii(job)
    return {
        "seed": job.config.seed,
        "folder": "/".join(job.folder.parts[-3:]),
        "state": job.state(),
        "failure": failures.get(job.name),
        "best_epoch": radii and radii["epoch"],
        "results": read_results(job.folder),
    }


def _images(jobs: Sequence[Job]) -> dict[str, int]:
    """attack -> how many test images it is run on, 0 for all of them."""
    return {name: e.subset for job in jobs for _, e in job.evaluations for name in e.attacks}
