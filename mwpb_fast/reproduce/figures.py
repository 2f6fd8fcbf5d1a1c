"""Pictures of a gathered table: ours beside the paper's, curves over radii or alpha, the radii of a row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwpb_fast.runs.plots import COLOURS, INK, STYLE, histogram, read_run, require_matplotlib

RADII = ("min", "p05", "p25", "p50", "p75", "p95", "mean", "max")

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write(
    result: dict[str, Any], folder: Path, radii: dict[str, list[Path]], epochs: dict[str, Path]
) -> list[Path]:
    """Draw what there is into `folder`; returns the files. radii: name of a picture (figure2) -> run folders.
    epochs: row -> run folder, of the radii over the epochs.

    Raises ConfigError where matplotlib cannot be used.
    """
    matplotlib = require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        if has_numbers(result):
            pictures["table"] = dots(result)
            if any(column["x"] is not None for column in result["columns"]):
                pictures["curves"] = curves_over_columns(result)
            if any(row["x"] is not None for row in result["rows"]):
                pictures["curves"] = curves_over_rows(result)
        for name, runs in radii.items():
            pictures[name] = radius_distribution(result, name, runs)
        if epochs:
            pictures["radii"] = radii_over_epochs(result, epochs)
        for name, figure in pictures.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
    return [folder / f"{name}.png" for name in pictures]


def has_numbers(result: dict[str, Any]) -> bool:
    """Whether any cell holds a number of ours."""
    return any(cell[which]["n"] for row in result["rows"] for cell in row["cells"].values()
               for which in ("best", "last"))  # fmt: skip


def dots(result: dict[str, Any]) -> Figure:
    """The table as a panel for each column: ours with its spread at both checkpoints, and the paper's number."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows, columns = result["rows"], result["columns"]
    across = min(len(columns), 4)
    down = -(-len(columns) // across)
    size = (2.2 + 2.6 * across, (0.9 + 0.32 * len(rows)) * down + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axis, column in zip(axes, columns, strict=False):
        axis.set_title(column["label"])
        for y, row in enumerate(rows):
            cell = row["cells"][column["key"]]
            _dot(axis, cell["last"], y + 0.18, COLOURS[5], "s", 4)
            _dot(axis, cell["best"], y, COLOURS[0], "o", 6)
            if cell["paper"] is not None:
                axis.plot(cell["paper"], y - 0.18, "D", color=COLOURS[1], fillstyle="none", markersize=6)
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.margins(x=0.12)
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    marks: list[dict[str, Any]] = [
        {"label": "ours, best checkpoint", "color": COLOURS[0], "marker": "o"},
        {"label": "ours, last checkpoint", "color": COLOURS[5], "marker": "s"},
    ]
    if any(cell["paper"] is not None for row in rows for cell in row["cells"].values()):
        marks.append({"label": "paper", "color": COLOURS[1], "marker": "D", "fillstyle": "none"})
    handles = [Line2D([], [], linestyle="none", **mark) for mark in marks]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    _title(figure, result)
    return figure


def _dot(axis: Axes, part: dict[str, Any], y: float, colour: str, marker: str, size: float) -> None:
    if part["mean"] is not None:
        axis.errorbar(part["mean"], y, xerr=part["std"] or 0, fmt=marker, color=colour, markersize=size, capsize=2)


def curves_over_columns(result: dict[str, Any]) -> Figure:
    """Accuracy over the columns that have an x (the radii of an attack): a curve a row, the paper's dashed."""
    columns = [column for column in result["columns"] if column["x"] is not None]
    series = [
        (row["label"], [(column["x"], row["cells"][column["key"]]) for column in columns])
        for row in result["rows"]
    ]
    return _curves(result, series)


def curves_over_rows(result: dict[str, Any]) -> Figure:
    """Accuracy over the rows that have an x (alpha): a curve a column, the paper's dashed."""
    rows = [row for row in result["rows"] if row["x"] is not None]
    series = [
        (column["label"], [(row["x"], row["cells"][column["key"]]) for row in rows])
        for column in result["columns"]
    ]
    return _curves(result, series)


def _curves(result: dict[str, Any], series: list[tuple[str, list[tuple[float, dict[str, Any]]]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.4), layout="constrained")
    axis = figure.subplots()
    for number, (label, points) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        marker = "os^"[number // len(COLOURS) % 3]
        ours = [(x, cell["best"]) for x, cell in points if cell["best"]["mean"] is not None]
        paper = [(x, cell["paper"]) for x, cell in points if cell["paper"] is not None]
        axis.errorbar(
            [x for x, _ in ours],
            [part["mean"] for _, part in ours],
            yerr=[part["std"] or 0 for _, part in ours],
            color=colour, marker=marker, markersize=4, capsize=2, label=label,
        )  # fmt: skip
        axis.plot([x for x, _ in paper], [y for _, y in paper], "--", color=colour, linewidth=1)
    axis.set_xlabel(result["axis"])
    axis.set_ylabel("accuracy, % (solid: ours, best checkpoint; dashed: the paper's)")
    figure.legend(loc="outside right upper", fontsize=9)
    _title(figure, result)
    return figure


def radius_distribution(result: dict[str, Any], name: str, runs: list[Path]) -> Figure:
    """The radii of the training images under the best checkpoint, a seed a row, with the paper's extremes."""
    figure = histogram([read_run(run) for run in runs])
    row = next(row for row in result["rows"] if row["figure"] == name)
    extremes = [row["cells"][key]["paper"] for key in ("radius_min", "radius_max") if key in row["cells"]]
    for axis in figure.axes:
        for x in extremes:
            axis.axvline(255 * x, color=COLOURS[1], linewidth=1.2)
    for legend in list(figure.legends):
        legend.remove()
    told = "; red: the paper's smallest and largest radius" if extremes else ""
    seeds = f", seeds {', '.join(run.name.removeprefix('seed') for run in runs)}"
    figure.suptitle(f"{row['label']}, best epoch{seeds}{told}", fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def radii_over_epochs(result: dict[str, Any], folders: dict[str, Path]) -> Figure:
    """The radii of the training batches over the epochs, a panel a row: their range, 5 to 95 %, 25 to 75 %, median
    and mean. Logs of earlier versions have the range and the mean alone."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["row"] in folders]
    across = min(len(rows), 4)
    down = -(-len(rows) // across)
    figure = Figure(figsize=(1 + 3 * across, 0.8 + 2.3 * down), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, row in zip(axes, rows, strict=False):
        run = read_run(folders[row["row"]])
        found = {name: dict(zip(*run.column(f"radius_{name}"), strict=True)) for name in RADII}
        for low, high, strength in (("min", "max", 0.12), ("p05", "p95", 0.22), ("p25", "p75", 0.4)):
            epochs = sorted(found[low].keys() & found[high].keys())
            ends = ([255 * found[end][epoch] for epoch in epochs] for end in (low, high))
            axis.fill_between(epochs, *ends, step="mid", color=COLOURS[0], alpha=strength, linewidth=0)
        for name, colour in (("p50", COLOURS[0]), ("mean", COLOURS[1])):
            values = [255 * value for value in found[name].values()]
            axis.step(list(found[name]), values, where="mid", color=colour, linewidth=1.4)
        axis.set_title(f"{row['label']}, seed {folders[row['row']].name.removeprefix('seed')}", fontsize=9)
    axes[0].set_ylim(bottom=0)  # for all, once their largest radii are known
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    what = "training radii in 1/255 over the epochs: range, 5 to 95 %, 25 to 75 %; blue median, red mean"
    figure.suptitle(f"{result['table']}: {what}", fontsize=10, color=INK, x=0.01, ha="left")
    return figure


def _title(figure: Figure, result: dict[str, Any]) -> None:
    text = f"{result['table']}: {result['title']}"
    if result["changes"]:
        text += " (reduced setting)"
    figure.suptitle(text, fontsize=12, fontweight="bold", x=0.01, ha="left")
