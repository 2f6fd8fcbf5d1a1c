"""From run folders to the numbers of a table: mean and sample standard deviation over seeds, differences."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mwpb_fast.config import to_dict
from mwpb_fast.evaluation.score import interval, statistics
from mwpb_fast.reproduce.layout import CONTROL, TWO_PHASE, Column, Row, Table
from mwpb_fast.reproduce.plan import PlannedRun, changes, read_results, result_key, test_images
from mwpb_fast.runs.log import read_records

FORMAT = 1
CHECKPOINTS = ("best", "last")


def gather(table: Table, runs: Sequence[PlannedRun], failures: dict[str, str] | None = None) -> dict[str, Any]:
    """Everything about a table, in plain types; numbers that are not there are None, never guessed.

    In each cell: `paper`; for each checkpoint `mean`, `std` (sample standard deviation; None for fewer than two
    seeds), `values` by seed, `difference` to the paper, and `control`: mean and standard deviation of the
    differences to the control row, seed by seed, over the seeds that both have, and their mean's 95 % `interval`.
    """
    rows = [row for row in table.rows if any(run.row == row for run in runs)]
    columns = _columns(table, runs)
    mine = {row.name: [run for run in runs if run.row == row] for row in rows}
    found = {run.name: Found(run) for run in runs}
    values = {
        (row.name, column.key): {
            which: {
                run.config.seed: value
                for run in mine[row.name]
                if (value := found[run.name].value(column, which)) is not None
            }
            for which in CHECKPOINTS
        }
        for row in rows
        for column in columns
    }
    controlled = any(TWO_PHASE in row.label for row in rows)
    return {
        "format": FORMAT,
        "table": table.name,
        "title": table.title,
        "notes": [note for note in table.notes if controlled or note != CONTROL],
        "changes": changes(runs),
        "seeds": sorted({run.config.seed for run in runs}),
        "images": _images(runs),
        "axis": table.axis,
        "compared": table.compared,
        "columns": [{"key": column.key, "label": column.label, "digits": column.digits, "x": column.x}
                    for column in columns],
        "rows": [
            {
                "row": row.name,
                "label": row.label,
                "x": row.x,
                "figure": f"figure{row.figure}" if row.figure else "",
                "recipe": mine[row.name][0].config.recipe,
                "config": _settings(mine[row.name][0]),
                "control": row.control if row.control in mine else None,
                "runs": [_run(found[run.name], failures or {}) for run in mine[row.name]],
                "cells": {column.key: _cell(table, row, column, values) for column in columns},
            }
            for row in rows
        ],
    }  # fmt: skip


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
        paired = statistics([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
        found["control"] = paired | {"interval": interval(paired)}
        cell[which] = found | {"values": {str(seed): value for seed, value in ours.items()}}
    return cell


def _columns(table: Table, runs: Sequence[PlannedRun]) -> list[Column]:
    """The table's columns, and one more for each attack that was asked for besides."""
    asked = dict.fromkeys(name for run in runs for _, e in run.evaluations for name in e.attacks)
    known = {column.attack for column in table.columns}
    others = [Column(key=name, label=name, attack=name) for name in asked if name not in known]
    return [*table.columns, *others]


class Found:
    """What is in the folder of a run; nothing of it where the folder is another run's."""

    def __init__(self, run: PlannedRun) -> None:
        self.run = run
        mine = not run.foreign()
        self.results = read_results(run.folder) if mine else {}
        records = read_records(run.folder / "metrics.jsonl") if mine else []
        self.records = {record["epoch"]: record for record in records}
        content = _read(run.folder / "radii.json") if mine else None
        values = [radius for radius in content["radii"] if _number(radius) is not None] if content else []
        self.best_epoch: int | None = content["epoch"] if content else None
        self.radii: dict[str, float] = {}
        if values:
            self.radii = {"min": min(values), "mean": math.fsum(values) / len(values), "max": max(values)}

    def value(self, column: Column, which: str) -> float | None:
        """The number of a column for a checkpoint, if there is one."""
        if column.source == "attack":
            for checkpoint, evaluation in self.run.evaluations:
                if checkpoint == which and column.attack in evaluation.attacks:
                    return (
                        self.results.get(which, {}).get(result_key(column.attack, evaluation), {}).get("accuracy")
                    )
            return None
        if column.source == "radii":
            return self.radii.get(column.attack) if which == "best" else None
        epoch = self.best_epoch if which == "best" else self.run.config.epochs
        return _number(self.records.get(epoch, {}).get(f"radius_{column.attack}"))


def _read(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _number(value: Any) -> float | None:
    """The number; None also for the NaN that earlier versions wrote."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _run(found: Found, failures: dict[str, str]) -> dict[str, Any]:
    run = found.run
    seconds = [record.get("seconds", 0.0) for record in found.records.values()]
    return {
        "seed": run.config.seed,
        "folder": "/".join(run.folder.parts[-3:]),
        "state": run.state(),
        "failure": failures.get(run.name),
        "best_epoch": found.best_epoch,
        "training_seconds": round(math.fsum(seconds), 1),
        "environment": _read(run.folder / "environment.json"),
        "results": {
            which: {key: {k: v for k, v in result.items() if k != "environment"} for key, result in kept.items()}
            for which, kept in found.results.items()
        },
    }


def _settings(run: PlannedRun) -> dict[str, Any]:
    """The row's configuration, without what belongs to a machine or a seed."""
    plain = to_dict(run.config)
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "dir"}
    return {key: value for key, value in plain.items() if key != "seed"}


def _images(runs: Sequence[PlannedRun]) -> dict[str, int]:
    """attack -> how many test images it is run on, 0 for all of them."""
    return {name: test_images(name, e) for run in runs for _, e in run.evaluations for name in e.attacks}
