"""The charts of one or several runs: learning curves, radii, budgets, classes, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mwpb_fast.config.radius import parse_radius
from mwpb_fast.evaluation.score import wilson
from mwpb_fast.report.chart import BOTTOM, Axis, Chart, below_slanted, epochs, number, span
from mwpb_fast.report.markup import Markup
from mwpb_fast.report.read import Attack, Result, Run, number_in
from mwpb_fast.system.units import counted

QUANTILES = ("min", "p05", "p25", "p50", "p75", "p95", "max")
SHARES = (0.05, 0.20, 0.25, 0.25, 0.20, 0.05)  # of the images, between two of them
COLUMNS = 110  # of a heat map; of more epochs some are left out
BINS = 48
MOST_BARS = 20  # classes that a chart of bars has room for


def colour(number: int) -> str:
    return f"c{number % 6}"


def learning(runs: Sequence[Run]) -> list[Markup]:
    """Loss and accuracy on held-out images, learning rate and gradient, over the epochs."""
    found = [accuracy(runs), _over_epochs(runs, "loss", "Training loss", "loss")]
    found += [_over_epochs(runs, "learning_rate", "Learning rate", "log scale", log=True, steps=True)]
    found += [_over_epochs(runs, "norm_mean", "Gradient norm", "mean over the steps")]
    if len(runs) > 1:
        found.append(_over_epochs(runs, "radius_mean", "Mean radius", "1/255", scale=255, zero=True, steps=True))
    return [chart for chart in found if chart is not None]


def speed(runs: Sequence[Run]) -> list[Markup]:
    chart = _over_epochs(runs, "images_per_second", "Throughput", "images a second", zero=True)
    return [] if chart is None else [chart]


def accuracy(runs: Sequence[Run]) -> Markup | None:
    """Validation accuracy: of one run a colour for each kind, of several a colour for each run."""
    columns = [(run.column("natural"), run.column("robust")) for run in runs]
    if not any(robust for _, robust in columns):
        return None
    chart = Chart("Validation accuracy", _epochs(runs), Axis("% of held-out images", 0, 102))
    _shade_warmup(chart, runs)
    for i, (natural, robust) in enumerate(columns):
        one = len(runs) == 1
        chart.line(natural, "c1" if one else runs[i].colour, dashed=True)
        chart.line(robust, "c0" if one else runs[i].colour)
    if len(runs) == 1:
        chart.legend("c1", "natural", dashed=True)
        chart.legend("c0", "robust (PGD-10)")
        (epoch, best), (last_epoch, last) = (pick(columns[0][1]) for pick in (_best, lambda c: c[-1]))
        chart.dots([(epoch, best)], "c0", 4.5)
        after = "" if epoch == last_epoch else f"; {last:.1f} % in epoch {last_epoch:.0f}"
        chart.tell(f"Best robust accuracy {best:.1f} % in epoch {epoch:.0f}{after}.")
    else:
        _name(chart, runs)
        chart.tell("Solid: robust (PGD-10); dashed: natural.")
    return chart.figure()


def _best(column: list[tuple[float, float]]) -> tuple[float, float]:
    return max(column, key=lambda point: (point[1], -point[0]))


def _over_epochs(
    runs: Sequence[Run], name: str, title: str, unit: str, *, scale: float = 1, steps: bool = False, **how: Any
) -> Markup | None:
    columns = [[(epoch, scale * value) for epoch, value in run.column(name)] for run in runs]
    if not any(columns):
        return None
    chart = Chart(title, _epochs(runs), span((y for column in columns for _, y in column), unit, **how))
    _shade_warmup(chart, runs)
    for run, column in zip(runs, columns, strict=True):
        chart.line(column, run.colour, steps=steps)
    if len(runs) > 1:
        _name(chart, runs)
    return chart.figure()


def _epochs(runs: Sequence[Run]) -> Axis:
    return epochs(1, max(1, *(run.last_epoch for run in runs)))


def _name(chart: Chart, runs: Sequence[Run]) -> None:
    for method, colour in {run.method: run.colour for run in runs}.items():
        chart.legend(colour, method)


def _shade_warmup(chart: Chart, runs: Sequence[Run]) -> None:
    warmups = {run.count("warmup_epochs") for run in runs}
    if len(warmups) == 1 and (warmup := warmups.pop()) > 0:
        chart.shade(0.5, warmup + 0.5, "warm-up")


# radii --------------------------------------------------------------------------------------------------------
def heat(run: Run) -> Markup | None:
    """Where the training radii lie in each epoch: the stronger the colour, the more images have such a radius."""
    rows = [(r["epoch"], _edges(r)) for r in run.records]
    whole = [(epoch, edges) for epoch, edges in rows if edges]
    if not whole:
        return None
    bounds = _bounds(run)
    tops = [edge for _, edges in whole for edge in edges] + [r for _, line in bounds for _, r in line]
    y = span(tops, "radius in 1/255", zero=True)
    chart = Chart("Radii of the training images", _epochs([run]), y)
    floor = (y.high - y.low) / 60  # as high as a cell is drawn at least
    every = max(1, math.ceil(len(whole) / COLUMNS))
    for epoch, edges in whole[::every]:
        cells = _cells(edges, floor)
        top = max(share / max(high - low, floor) for low, high, share in cells)
        for low, high, share in cells:
            density = share / max(high - low, floor) / top
            told = f"epoch {epoch}: {100 * share:.0f} % of the images in {low:.2f} to {high:.2f}"
            chart.bar((epoch - 0.5, epoch - 0.5 + every), (low, high), "c0", 0.12 + 0.88 * density**0.7, 2.0, told)
    chart.line([(e, 255 * v) for e, v in run.column("radius_mean")], "c1", steps=True)
    chart.legend("c1", "mean")
    for name, line in bounds:
        chart.line(line, "c2", dashed=True, steps=True)
        if name:
            chart.legend("c2", name, dashed=True)
    chart.tell("The stronger the colour, the more images have such a radius.")
    return chart.figure()


def _edges(record: dict[str, Any]) -> list[float]:
    """A record's quantiles in 1/255, rising; of an earlier version's the ends and the mean; empty without."""
    found = [number_in(record.get(f"radius_{name}")) for name in QUANTILES]
    if None in found:
        found = [number_in(record.get(f"radius_{name}")) for name in ("min", "mean", "max")]
    values = [255 * value for value in found if value is not None]
    return sorted(values) if len(values) == len(found) else []


def _cells(edges: list[float], floor: float) -> list[tuple[float, float, float]]:
    """(low, high, share of the images) between the edges; those that are nearly one point are one cell."""
    shares = SHARES if len(edges) == len(QUANTILES) else (0.5, 0.5)
    cells: list[tuple[float, float, float]] = []
    for low, high, share in zip(edges, edges[1:], shares, strict=False):
        if cells and high - cells[-1][0] < floor:
            cells[-1] = (cells[-1][0], high, cells[-1][2] + share)
        else:
            cells.append((low, high, share))
    return cells


def histogram(run: Run) -> Markup | None:
    """The radii of all training images under the best checkpoint, beside the bounds of the budget."""
    if not run.radii:
        return None
    values = [255 * radius for radius in run.radii]
    eps, alpha = budget(run)
    ends = [eps * math.exp(side * alpha) for side in (-1, 1)] if eps and alpha else []
    low, high = min(values), max(values)
    width = (high - low) / BINS or max(0.02 * high, 0.1)
    counts = [0] * BINS
    for value in values:
        counts[min(int((value - low) / width), BINS - 1)] += 1
    shares = [100 * count / len(values) for count in counts]
    x = span([low, high + width * (high == low), *ends, *([eps] if eps else [])], "radius in 1/255")
    chart = Chart("Radii under the best checkpoint", x, Axis("% of the training images", 0, 1.15 * max(shares)))
    for i, share in enumerate(shares):
        if share:
            inside = low + i * width, low + (i + 1) * width
            chart.bar(inside, (0, share), "c0", told=f"{inside[0]:.2f} to {inside[1]:.2f}: {share:.1f} %")
    if eps:
        chart.upright(eps, "eps")
    for name, end in zip(("exp(-alpha) eps", "exp(alpha) eps"), ends, strict=False):
        chart.upright(end, name)
    mean = math.fsum(values) / len(values)
    chart.tell(f"{len(values):,} images: from {low:.2f} to {high:.2f}, mean {mean:.2f}.")
    return chart.figure()


def budget(run: Run, axis: str = "budget") -> tuple[float | None, float | None]:
    """eps in 1/255 and alpha of a budget; None where it has none, or shares its radii out otherwise."""
    try:
        eps = float(255 * parse_radius(run.option(f"{axis}.eps")))
    except (ValueError, TypeError):
        eps = None
    return eps, number_in(run.option(f"{axis}.alpha")) if run.option(f"{axis}.share", "own") == "own" else None


def _bounds(run: Run) -> list[tuple[str, list[tuple[float, float]]]]:
    """eps and exp(-alpha) eps to exp(alpha) eps in 1/255 over the epochs, with their names: what the records
    say, or the two phases of the configuration; nothing of a budget without alpha."""
    last = max(run.last_epoch, run.count("epochs"))
    warmup = min(run.count("warmup_epochs"), last)
    told: list[dict[float, float]] = []
    for i, (name, scale) in enumerate((("eps", 255), ("alpha", 1))):
        points = {epoch: scale * value for epoch, value in run.column(name)}
        before, after = (budget(run, axis)[i] for axis in ("warmup", "budget"))
        if not points and after is not None:
            points = {float(e): (before or 0.0) if e <= warmup else after for e in range(1, last + 1)}
        told.append(points)
    eps, alpha = told
    if not any(alpha.values()):
        return []
    lines = [[(e, eps[e] * math.exp(side * alpha[e])) for e in eps if e in alpha] for side in (0, -1, 1)]
    return list(zip(("eps, and exp(\u00b1alpha) eps", "", ""), lines, strict=True))


def scatter(points: Sequence[tuple[float, float, str]], eps: float | None) -> Markup | None:
    """Margin against radius in 1/255 of test images. points: (margin, radius, what became of it)."""
    if not points:
        return None
    x = Axis("margin of the natural image", -1.05, 1.05)
    chart = Chart(
        "Margin against radius", x, span([p[1] for p in points] + ([eps] if eps else []), "radius in 1/255")
    )
    if eps:
        chart.level(eps, "eps")
    chart.upright(0.0, "decision")
    kinds = (
        ("wrong", "c3", "wrong already"),
        ("falls", "c1", "falls to an attack"),
        ("holds", "c0", "holds"),
        ("right", "c5", "right, not attacked"),
    )
    for kind, css, name in kinds:
        mine = [(margin, radius) for margin, radius, what in points if what == kind]
        if mine:
            chart.dots(mine, css, 3, 0.6)
            chart.legend(css, f"{name} ({len(mine)})", dot=True)
    fates = (
        "; colours by the evaluation's worst case" if {"falls", "holds"} & {what for *_, what in points} else ""
    )
    chart.tell(f"{len(points)} test images, at the radius of the run's budget{fates}.")
    return chart.figure()


# results ------------------------------------------------------------------------------------------------------
def classes(result: Result) -> Markup | None:
    """Natural and robust accuracy of each class, the weakest first; of many classes as curves of rank."""
    natural, robust = result.attacks.get("natural"), result.worst
    if natural is None or robust is None or len(natural.per_class) != len(result.classes):
        return None
    both = zip(result.classes, natural.per_class, robust.per_class, strict=False)
    rows = sorted(
        ((r, n, name) for name, n, r in both if n is not None and r is not None), key=lambda row: row[:2]
    )
    if not rows:
        return None
    if len(rows) > MOST_BARS:
        chart = Chart("Accuracy by class", Axis("classes, the weakest first", 0, len(rows)), Axis("%", 0, 102))
        for css, name, values in (
            ("c1", "natural", sorted(n for _, n, _ in rows)),
            ("c0", "robust", [r for r, _, _ in rows]),
        ):
            chart.line([(i + 0.5, value) for i, value in enumerate(values)], css, steps=True)
            chart.legend(css, name)
    else:
        names = [name for *_, name in rows]
        slanted = max(map(len, names)) > 3
        bottom = below_slanted(names) if slanted else BOTTOM
        x = Axis("", -0.5, len(rows) - 0.5)
        chart = Chart("Accuracy by class", x, Axis("%", 0, 102), labelled=False, bottom=bottom)
        for i, (r, n, name) in enumerate(rows):
            chart.bar((i - 0.4, i + 0.4), (0, n), "c1", 0.35, told=f"{name}: natural {n:.1f} %")
            chart.bar((i - 0.25, i + 0.25), (0, r), "c0", told=f"{name}: robust {r:.1f} %")
            chart.below(i, name, slanted)
        chart.legend("c1", "natural")
        chart.legend("c0", "robust (worst case)")
    low, high = rows[0], rows[-1]
    chart.tell(f"Weakest: {low[2]}, {low[0]:.1f} %. Strongest: {high[2]}, {high[0]:.1f} %.")
    if counts := [n for n in result.counts if n]:
        few, many = min(counts), max(counts)
        ends = wilson(few // 2, few)
        told = f"{few:,} to {many:,} test images" if few < many else counted(few, "test image")
        chart.tell(
            f"{told} of each class: an accuracy of 50 % is known to ±{50 * (ends[1] - ends[0]):.0f} points."
        )
    return chart.figure()


def sweep(points: Sequence[tuple[Fraction, Attack]]) -> Markup | None:
    """Accuracy under PGD-20 at rising radii, which has to come to about zero."""
    if len(points) < 2:
        return None
    values = [(float(255 * eps), attack) for eps, attack in points]
    chart = Chart("Accuracy at rising radii", Axis("eps in 1/255", 0, 1.04 * values[-1][0]), Axis("%", 0, 102))
    for eps, attack in values:
        chart.bar((eps, eps + 0.004 * values[-1][0]), attack.interval, "c0", 0.5)
    chart.line([(eps, attack.accuracy) for eps, attack in values], "c0")
    last = values[-1]
    chart.tell(f"PGD-20; {last[1].accuracy:.1f} % at eps {number(last[0])}/255. It has to come to about zero.")
    return chart.figure()
