"""From run folders to the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mwpb_fast.config import ConfigError
from mwpb_fast.report.images import Looked, look
from mwpb_fast.report.judged import headline
from mwpb_fast.report.page import page
from mwpb_fast.report.read import read
from mwpb_fast.system.files import write_atomically

COUNT = {1: 8, 2: 8}  # images of each run by how many runs there are; of more runs fewer
FEWER = 4
MOST_RUNS = 8  # that show images: each takes up to half a second, and room in the file


def write(folders: Sequence[Path], target: Path, *, images: bool = True) -> Path:
    """Write the report of one or several runs; returns `target`. images: also what needs the checkpoint, the data
    and torch: the images and the margins. Raises ConfigError where a folder is no run's."""
    runs = [read(folder) for folder in folders]
    looked: list[Looked | str] = []
    for run in runs:
        if not images:
            looked.append("left out")
        elif len(runs) > MOST_RUNS:
            looked.append(f"left out, as there are more than {MOST_RUNS} runs")
        else:
            try:
                looked.append(look(run.folder, headline(run), COUNT.get(len(runs), FEWER)))
            except ConfigError as error:
                looked.append(str(error))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page(runs, looked).encode())
    return target
