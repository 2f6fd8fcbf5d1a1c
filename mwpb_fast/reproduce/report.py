"""From the runs of a table to its files, at any moment: what is not there yet is shown as missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mwpb_fast.reproduce import render
from mwpb_fast.reproduce.gather import gather
from mwpb_fast.reproduce.plan import Job, changes
from mwpb_fast.reproduce.tables import Table
from mwpb_fast.runs.log import table as text_table


def publish(
    table: Table,
    jobs: Sequence[Job],
    folder: Path,
    failures: dict[str, str] | None = None,
    *,
    pictures: bool = True,
) -> tuple[dict[str, Any], list[Path], str]:
    """Write table.json, table.md, table.csv and the pictures; returns the table, the files, and why there are no
    pictures, if so."""
    result = gather(table, jobs, failures)
    written, reason = render.write(result, folder), ""
    if pictures:
        radii: dict[str, list[Path]] = {}
        for job in jobs:
            if job.row.figure and not job.foreign() and (job.folder / "radii.json").exists():
                radii.setdefault(f"figure{job.row.figure}", []).append(job.folder)
        drawn, reason = render.draw(result, folder, radii)
        written += drawn
    return result, written, reason


def plan_lines(table: Table, jobs: Sequence[Job], out: Path) -> Iterator[str]:
    """What is done and what is left, a line a run."""
    states = [job.state() for job in jobs]
    done = states.count("done")
    yield f"{table.name}: {table.title}; {len(jobs)} runs in {out / 'runs'}, {done} done"
    if departures := changes(jobs):
        yield f"reduced setting: {'; '.join(departures)}"
    rows = [[job.row.name, str(job.config.seed), state, "/".join(job.folder.parts[-2:])]
            for job, state in zip(jobs, states, strict=True)]  # fmt: skip
    yield from text_table(["row", "seed", "state", "run"], rows)
