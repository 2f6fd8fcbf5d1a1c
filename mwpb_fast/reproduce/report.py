"""From the runs of a table to its files, at any moment: what is not there yet is shown as missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mwpb_fast.reproduce import render
from mwpb_fast.reproduce.gather import gather
from mwpb_fast.reproduce.layout import Table
from mwpb_fast.reproduce.plan import PlannedRun, changes
from mwpb_fast.system import text_tables
from mwpb_fast.system.lock import turn
from mwpb_fast.system.units import counted


def publish(
    table: Table,
    runs: Sequence[PlannedRun],
    folder: Path,
    failures: dict[str, str] | None = None,
    *,
    pictures: bool = True,
) -> tuple[dict[str, Any], list[Path], str]:
    """Write table.json, table.md, table.csv and the pictures; returns the table, the files, and why there are no
    pictures, if so. Of several processes one does so after another, so that what is newer stays."""
    folder.mkdir(parents=True, exist_ok=True)
    with turn(folder / "table.lock"):
        result = gather(table, runs, failures)
        written, reason = render.write(result, folder), ""
        if pictures:
            radii: dict[str, list[Path]] = {}
            for run in runs:
                if run.row.figure and not run.foreign() and (run.folder / "radii.json").exists():
                    radii.setdefault(f"figure{run.row.figure}", []).append(run.folder)
            drawn, reason = render.draw(result, folder, radii, _logs(table, runs))
            written += drawn
    return result, written, reason


def _logs(table: Table, runs: Sequence[PlannedRun]) -> dict[str, Path]:
    """Row -> the folder of its first seed that has records, where the radii over the epochs are to be drawn."""
    if not table.compared:
        return {}
    begun = [run for run in runs if not run.foreign() and (run.folder / "metrics.jsonl").exists()]
    return {run.row.name: run.folder for run in reversed(begun)}


def plan_lines(table: Table, runs: Sequence[PlannedRun], out: Path) -> Iterator[str]:
    """What is done and what is left, a line a run."""
    states = [run.state() for run in runs]
    done = states.count("done")
    yield f"{table.name}: {table.title}; {counted(len(runs), 'run')} in {out / 'runs'}, {done} done"
    if departures := changes(runs):
        yield f"reduced setting: {'; '.join(departures)}"
    rows = [[run.row.name, str(run.config.seed), state, "/".join(run.folder.parts[-2:])]
            for run, state in zip(runs, states, strict=True)]  # fmt: skip
    yield from text_tables.plain(["row", "seed", "state", "run"], rows)
