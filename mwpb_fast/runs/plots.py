"""Pictures of runs: learning curves, and the histogram of the training images' radii."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwpb_fast.config import ConfigError, yaml_file
from mwpb_fast.config.radius import parse_radius
from mwpb_fast.runs.found import require_run
from mwpb_fast.runs.log import parse_records
from mwpb_fast.system.optional import attempt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2a6f97", "#d1603d", "#3a7d44", "#7b4fa3", "#b8860b", "#4a4a4a")
BINS = 60
INK = "#333333"
STYLE: Any = {
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class PlottedRun:
    """What a run folder says of itself. records: those of metrics.jsonl. radii: of all training images under
    the best checkpoint, for images in [0, 1]; empty where there is no radii.json. eps, alpha: of the budget that
    made them, 0 for a budget without."""

    label: str
    records: list[dict[str, Any]]
    warmup_epochs: int
    radii: list[float]
    eps: float
    alpha: float

    @property
    def bounds(self) -> tuple[float, float]:
        """exp(-alpha) * eps and exp(alpha) * eps, between which a margin-weighted radius lies."""
        return self.eps * math.exp(-self.alpha), self.eps * math.exp(self.alpha)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Epochs that have this number, and the numbers."""
        found = [(r["epoch"], float(r[name])) for r in self.records if _is_number(r.get(name))]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def radii_columns(self) -> tuple[list[int], list[float], list[float], list[float]]:
        """Epochs, and their smallest, mean and largest radius, of those that have all three."""
        low, mean, high = (dict(zip(*self.column(f"radius_{k}"), strict=True)) for k in ("min", "mean", "max"))
        epochs = [epoch for epoch in low if epoch in mean and epoch in high]
        return epochs, [low[e] for e in epochs], [mean[e] for e in epochs], [high[e] for e in epochs]

    def radii_line(self) -> str:
        """Smallest, mean and largest radius in one line; empty without radii."""
        if not self.radii:
            return ""
        low, mean, high = min(self.radii), math.fsum(self.radii) / len(self.radii), max(self.radii)
        text = (
            f"radii of {len(self.radii):,} training images, in 1/255: "
            f"min {255 * low:.2f}, mean {255 * mean:.2f}, max {255 * high:.2f}"
        )
        if self.alpha and self.eps:
            text += " (exp(-alpha) eps = {:.2f}, exp(alpha) eps = {:.2f})".format(*(255 * b for b in self.bounds))
        return text


def read_run(folder: Path) -> PlottedRun:
    """The run in `folder`. Raises ConfigError, naming the file, where there is none or a file is damaged."""
    require_run(folder)
    path = folder / "config.yaml"
    try:
        config = yaml_file.read(path)
        label, warmup_epochs = str(config["recipe"]), int(config["warmup_epochs"])
        path = folder / "metrics.jsonl"
        records, bad = parse_records(path)
        if bad:
            raise ValueError(f"line {min(bad)} is no record")
        path = folder / "radii.json"
        found = json.loads(path.read_bytes()) if path.exists() else {"radii": [], "budget": {}}
        budget = found["budget"]
        return PlottedRun(
            label=label,
            records=records,
            warmup_epochs=warmup_epochs,
            radii=[float(radius) for radius in found["radii"] if _is_number(radius)],
            eps=float(parse_radius(budget.get("eps", 0))),
            # radii that a batch shares out keep to no bounds of their own
            alpha=float(budget.get("alpha", 0.0)) if budget.get("share", "own") == "own" else 0.0,
        )
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; is {folder} the folder of a run?") from error
    except ConfigError as error:
        raise ConfigError(f"{error}; is {folder} the folder of a run?") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not what a run writes ({' '.join(str(error).split())})") from error


def write(runs: Sequence[Path], folder: Path) -> list[Path]:
    """Draw curves.png and radii.png of one or several runs into `folder`; returns the files written.

    Several runs are drawn over one another. A picture without data is left out. Raises ConfigError where
    matplotlib cannot be used or a folder is not a run's.
    """
    found = _labelled([read_run(run) for run in runs], runs)
    matplotlib = require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw, runs_with_data in (
            ("curves.png", curves, [run for run in found if run.records]),
            ("radii.png", histogram, [run for run in found if run.radii]),
        ):
            if runs_with_data:
                path = folder / name
                draw(runs_with_data).savefig(path, dpi=150)
                written.append(path)
    return written


def require_matplotlib() -> Any:
    """The package, with the parts that pictures use. Raises ConfigError where it is missing or broken."""
    parts = ("figure", "lines", "ticker", "backends.backend_agg")
    found = attempt("matplotlib", *(f"matplotlib.{part}" for part in parts))
    if found.module is None:
        raise ConfigError(f"plots need matplotlib, which {found.why}: {found.cure('matplotlib', 'plots')}")
    return found.module


def curves(runs: Sequence[PlottedRun]) -> Figure:
    """Loss, validation accuracy, radius with its range, and learning rate, over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    (loss, accuracy), (radius, rate) = axes
    for run, colour in zip(runs, _colours(runs), strict=True):
        marker = {"marker": "o", "markersize": 3} if len(run.records) <= 40 else {}
        line: Any = {"color": colour, "linewidth": 1.6, **marker}
        loss.plot(*run.column("loss"), **line)
        accuracy.plot(*run.column("natural"), **line, linestyle="--")
        accuracy.plot(*run.column("robust"), **line)
        epochs, low, mean, high = run.radii_columns()
        band: Any = {"step": "mid", "color": colour, "alpha": 0.18, "linewidth": 0}
        radius.fill_between(epochs, _in_255(low), _in_255(high), **band)
        radius.step(epochs, _in_255(mean), where="mid", **line)
        rate.step(*run.column("learning_rate"), where="mid", **line)
    warmups = {run.warmup_epochs for run in runs}
    for axis, title in (
        (loss, "training loss"),
        (accuracy, "validation accuracy, %"),
        (radius, "training radius in 1/255: mean, and range over the images"),
        (rate, "learning rate"),
    ):
        axis.set_title(title)
        if len(warmups) == 1 and 0 not in warmups:
            axis.axvspan(0.5, min(*warmups, _last_epoch(runs)) + 0.5, color="#f3f1ea", zorder=0, linewidth=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.set_ylim(0, 103)
    radius.set_ylim(bottom=0)
    rate.set_yscale("log")
    loss.set_xlim(0.5, _last_epoch(runs) + 0.5)
    for axis in (radius, rate):
        axis.set_xlabel("epoch (shaded: warm-up)" if len(warmups) == 1 and 0 not in warmups else "epoch")
    _line_kinds(accuracy)
    _title(figure, runs)
    return figure


def histogram(runs: Sequence[PlottedRun]) -> Figure:
    """Radii of the training images, a row a run, with eps, exp(-alpha) * eps and exp(alpha) * eps marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6 if len(runs) == 1 else 1.2 + 2.2 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), sharex=True, squeeze=False)[:, 0]
    low = min(min(run.bounds[0], *run.radii) for run in runs)
    high = max(max(run.bounds[1], *run.radii) for run in runs)
    room = max(0.06 * (high - low), 0.5 / 255)
    for run, colour, axis in zip(runs, _colours(runs), axes, strict=True):
        share = [100 / len(run.radii)] * len(run.radii)
        edges = _in_255(_edges(run, (high - low + 2 * room) / BINS))
        axis.hist(_in_255(run.radii), edges, weights=share, color=colour, alpha=0.75)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.15)  # The marks' names need room.
        _mark(axis, r"$\epsilon$", 255 * run.eps, ":", side=1)
        if run.alpha:
            _mark(axis, r"$e^{-\alpha}\epsilon$", 255 * run.bounds[0], "--", side=1)
            _mark(axis, r"$e^{\alpha}\epsilon$", 255 * run.bounds[1], "--", side=-1)
        axis.set_ylabel("training images, %")
    axes[-1].set_xlim(255 * (low - room), 255 * (high + room))
    axes[-1].set_xlabel("radius in 1/255")
    _title(figure, runs)
    return figure


def _is_number(value: Any) -> bool:
    """Not null, nor the NaN of files that earlier versions wrote."""
    return value is not None and math.isfinite(float(value))


def _edges(run: PlottedRun, width: float) -> list[float]:
    """Bins about `width` wide that cover the radii and do not straddle the bounds."""
    low, high = run.bounds
    if low < high:
        width = (high - low) / max(1, round((high - low) / width))
    else:
        low, high = low - width / 2, high + width / 2
    slack = 1e-3 * width  # The radii are float32, the bounds float64.
    below = max(0, math.ceil((low - min(run.radii) - slack) / width))
    above = max(0, math.ceil((max(run.radii) - high - slack) / width))
    count = round((high - low) / width) + below + above
    edges = [low + width * (i - below) for i in range(count + 1)]
    return [edges[0] - slack, *edges[1:-1], edges[-1] + slack]


def _mark(axis: Axes, name: str, x: float, style: str, side: int) -> None:
    axis.axvline(x, color=INK, linestyle=style, linewidth=1.2)
    axis.annotate(
        f"{name}\n{x:.2f}",
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4 * side, -2),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="top",
        fontsize=9,
        color=INK,
    )


def _title(figure: Figure, runs: Sequence[PlottedRun]) -> None:
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        figure.suptitle(runs[0].label, fontsize=13, fontweight="bold", x=0.01, ha="left")
        return
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in _colours(runs)]
    figure.legend(handles, [run.label for run in runs], loc="outside upper left", ncols=min(len(runs), 4))


def _line_kinds(axis: Axes) -> None:
    from matplotlib.lines import Line2D

    kinds = [Line2D([], [], color=INK, linestyle=style) for style in ("--", "-")]
    axis.legend(kinds, ["natural", "robust (PGD-10)"], loc="best")


def _labelled(runs: list[PlottedRun], folders: Sequence[Path]) -> list[PlottedRun]:
    """Runs of the same recipe are told apart by their folders."""
    from dataclasses import replace

    labels = [run.label for run in runs]
    return [
        replace(run, label=f"{run.label} ({folder})") if labels.count(run.label) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def _colours(runs: Sequence[PlottedRun]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _in_255(values: Sequence[float]) -> list[float]:
    return [255 * value for value in values]


def _last_epoch(runs: Sequence[PlottedRun]) -> int:
    return max(record["epoch"] for run in runs for record in run.records)
