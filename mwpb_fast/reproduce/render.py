"""A gathered table as Markdown, CSV and JSON; a cell without a number is shown as a dash."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwpb_fast.config import ConfigError
from mwpb_fast.reproduce.gather import CHECKPOINTS
from mwpb_fast.system import text_tables
from mwpb_fast.system.files import to_json, write_atomically
from mwpb_fast.system.units import counted

MISSING = "-"
FIELDS = (
    "table", "row", "label", "column", "checkpoint", "paper", "mean", "std", "seeds", "difference",
    "control", "control_difference", "control_std", "values",
)  # fmt: skip


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write table.json, table.md and table.csv of `gather`'s result; returns their paths."""
    contents = {
        "table.json": to_json(result, indent=1) + "\n",
        "table.md": markdown(result),
        "table.csv": comma_separated(result),
    }
    for name, text in contents.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in contents]


def draw(
    result: dict[str, Any], folder: Path, radii: dict[str, list[Path]], epochs: dict[str, Path]
) -> tuple[list[Path], str]:
    """Draw table.png, and what else the table has as pictures; returns them, or none and why there are none."""
    try:
        from mwpb_fast.reproduce import figures

        return figures.write(result, folder, radii, epochs), ""
    except ConfigError as error:  # no matplotlib
        return [], str(error)


def markdown(result: dict[str, Any]) -> str:
    """The table with, for each row, the paper's numbers, ours and the differences, and what to know about it."""
    columns = result["columns"]
    header, rows = ["row", "", *(column["label"] for column in columns)], []
    for row in result["rows"]:
        label = row["label"]
        for name, cells in _lines(result, row):
            rows.append([label, name, *cells])
            label = ""
    table = text_tables.markdown(header, rows, right=range(2, len(header)))
    title = f"# {result['table']}: {result['title']}"
    return "\n".join([title, "", *_about(result), "", *table, "", *_runs(result)]) + "\n"


def _lines(result: dict[str, Any], row: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    columns, cells = result["columns"], [row["cells"][column["key"]] for column in result["columns"]]
    digits = [column["digits"] for column in columns]
    seeds = len(result["seeds"])
    if any(cell["paper"] is not None for cell in cells):
        yield "paper", [_number(cell["paper"], d) for cell, d in zip(cells, digits, strict=True)]
    for which in CHECKPOINTS:
        found = [cell[which] for cell in cells]
        if which == "best" or any(part["n"] for part in found):
            yield f"ours, {which}", [_spread(part, d, seeds) for part, d in zip(found, digits, strict=True)]
        if which == "best" and any(part["difference"] is not None for part in found):
            yield "ours - paper", [_number(p["difference"], d, "+") for p, d in zip(found, digits, strict=True)]
        if any(part["control"]["n"] for part in found):
            differences = [part["control"] for part in found]
            texts = [_spread(part, d, seeds, "+") for part, d in zip(differences, digits, strict=True)]
            yield f"ours - {_control(result, row)}, {which}", texts
            if result.get("compared") and any(part["interval"] for part in differences):
                yield "95 % interval", [_interval(p, d) for p, d in zip(differences, digits, strict=True)]


def _control(result: dict[str, Any], row: dict[str, Any]) -> str:
    """The row that another is compared with: by its label, where the table has several of them."""
    if not result.get("compared"):  # nor had files of earlier versions
        return "control"
    return next(str(other["label"]) for other in result["rows"] if other["row"] == row["control"])


def _interval(part: dict[str, Any], digits: int) -> str:
    if part["interval"] is None:
        return MISSING
    return " to ".join(_number(end, digits, "+") for end in part["interval"])


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return MISSING if value is None else format(value, f"{sign}.{digits}f")


def _spread(part: dict[str, Any], digits: int, seeds: int, sign: str = "") -> str:
    if part["mean"] is None:
        return MISSING
    text = _number(part["mean"], digits, sign)
    if part["std"] is not None:
        text += f" ± {part['std']:.{digits}f}"
    return text if part["n"] == seeds else f"{text} ({part['n']} of {seeds})"


def _about(result: dict[str, Any]) -> Iterator[str]:
    seeds = result["seeds"]
    count = f"Mean ± sample standard deviation over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"
    if len(seeds) == 1:
        count = f"One seed ({seeds[0]}), which says nothing of others"
    yield (
        f"{count}; differences to the control seed by seed. Best: the epoch best under PGD-10 on held-out "
        "training images. Accuracies in percent, radii for images in [0, 1]."
    )
    if result["changes"]:
        yield f"\n**Reduced setting:** {'; '.join(result['changes'])}."
    counts: dict[int, list[str]] = {}
    for attack, images in result["images"].items():
        counts.setdefault(images, []).append(attack)
    if set(counts) - {0}:
        parts = [f"{images or 'all'} ({', '.join(attacks)})" for images, attacks in counts.items()]
        yield f"\nTest images, stratified by class: {'; '.join(parts)}."
    for note in result["notes"]:
        yield f"\n{note}"


def _runs(result: dict[str, Any]) -> Iterator[str]:
    runs = [(f"{row['recipe']} seed {run['seed']}", run) for row in result["rows"] for run in row["runs"]]
    done = sum(run["state"] == "done" for _, run in runs)
    yield f"{done} of {counted(len(runs), 'run')} {'is' if len(runs) == 1 else 'are'} complete."
    for name, run in runs:
        if run["state"] != "done":
            yield f"- {name}: {'failed: ' + run['failure'] if run['failure'] else run['state']}"
        for which, results in run["results"].items():
            for key, found in results.items():
                for kind, warning in (found.get("warnings") or {}).items():
                    yield f"- {name}, {which}, {key.split()[0]}: warning ({kind}): {warning['message']}"


def comma_separated(result: dict[str, Any]) -> str:
    """One line for each row, column and checkpoint; empty where there is no number."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in result["rows"]:
        for column in result["columns"]:
            cell = row["cells"][column["key"]]
            for which in CHECKPOINTS:
                part = cell[which]
                writer.writerow(
                    {
                        "table": result["table"],
                        "row": row["row"],
                        "label": row["label"],
                        "column": column["label"],
                        "checkpoint": which,
                        "paper": cell["paper"],
                        "mean": part["mean"],
                        "std": part["std"],
                        "seeds": part["n"],
                        "difference": part["difference"],
                        "control": row["control"],
                        "control_difference": part["control"]["mean"],
                        "control_std": part["control"]["std"],
                        "values": " ".join(str(value) for value in part["values"].values()),
                    }
                )
    return buffer.getvalue()
