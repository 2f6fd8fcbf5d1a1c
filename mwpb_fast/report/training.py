"""The parts of a page that are about training: curves, radii, classes, images."""

from __future__ import annotations

from mwpb_fast.report import curves
from mwpb_fast.report.images import STEPS, Looked
from mwpb_fast.report.judged import headline
from mwpb_fast.report.markup import Markup, details, element, table
from mwpb_fast.report.parts import SIGNS, axis, soft
from mwpb_fast.report.read import Run, number_in

COLUMNS = (
    ("loss", "{:.4f}"),
    ("natural", "{:.2f}"),
    ("robust", "{:.2f}"),
    ("radius_mean", "{:.5f}"),
    ("learning_rate", "{:.2g}"),
    ("norm_mean", "{:.3g}"),
    ("images_per_second", "{:,.0f}"),
    ("bad_steps", "{:.0f}"),
)


def learning(run: Run) -> list[Markup]:
    if not run.records:
        return [soft("No epoch is done yet.")]
    return [element("div", curves.learning([run]), class_="charts"), _numbers(run)]


def _numbers(run: Run) -> Markup:
    """All epochs as a table: the charts for those who do not see them."""
    columns = [(name, form) for name, form in COLUMNS if run.column(name)]
    rows = []
    for record in run.records:
        values = [(number_in(record.get(name)), form) for name, form in columns]
        cells = ["" if value is None else form.format(value) for value, form in values]
        rows.append([record["epoch"], record.get("phase", ""), *cells])
    header = ["epoch", "phase", *(name.replace("_", " ") for name, _ in columns)]
    return details("All epochs in numbers", table(header, rows, "metrics.jsonl"))


def radii(run: Run, looked: Looked | str) -> list[Markup]:
    eps = curves.budget(run)[0]
    points = [] if isinstance(looked, str) else looked.points
    charts = [curves.heat(run), curves.histogram(run), curves.scatter(points, eps)]
    drawn = [chart for chart in charts if chart is not None]
    found = [element("div", drawn, class_="charts")] if drawn else []
    if not run.radii:
        found.append(soft("The radii of all training images are written when training ends."))
    if isinstance(looked, str):
        found.append(soft(f"No margins of test images: {looked}"))
    elif not points:
        found.append(soft("No margins against radii: the attack of this run finds its radii itself."))
    warmup, last = run.count("warmup_epochs"), run.count("epochs")
    before = f"{axis(run, 'warmup')} up to epoch {min(warmup, last)}" if warmup else ""
    after = axis(run, "budget") if warmup < last else ""
    found.append(soft(f"Budget: {', then '.join(filter(None, (before, after)))}."))
    return found


def classes(run: Run) -> list[Markup]:
    result = headline(run)
    if result is None or not (chart := curves.classes(result)):
        return [soft("No accuracies of the classes: there is no evaluation, or one that is older than they are.")]
    shown = [attack for attack in result.attacks.values() if len(attack.per_class) == len(result.classes)]
    rows = [
        [name, *(f"{n:,}" for n in result.counts[i : i + 1]),
         *("" if (value := attack.per_class[i]) is None else f"{value:.1f} %" for attack in shown)]
        for i, name in enumerate(result.classes)
    ]  # fmt: skip
    images = ["images"] if result.counts else []
    numbers = table(["class", *images, *(attack.name for attack in shown)], rows, result.file)
    return [element("div", chart, class_="charts"), details("All classes in numbers", numbers)]


def grid(looked: Looked | str) -> list[Markup]:
    if isinstance(looked, str):
        return [soft(f"No images: {looked}")]
    told = (
        f"From the smallest margin to the largest: natural, after PGD-{STEPS} at eps {looked.eps}, and the "
        "difference between them, where gray is none, and a channel at its end is eps up or down. "
        f"{SIGNS['ok']}: still right when attacked; {SIGNS['doubt']}: wrong then."
    )
    cells = []
    for shown in looked.shown:
        alts = ("natural", "adversarial", "difference")
        pictures = [
            element("div", element("img", src=Markup(source), alt=f"{alt} image {shown.index}", loading="lazy"),
                    element("span", alt))
            for source, alt in zip(shown.pictures, alts, strict=True)
        ]  # fmt: skip
        wrong = [name != shown.label for name in shown.predicted]
        sign = "doubt" if wrong[1] else "ok"
        before, after = shown.predicted
        fate = f"seen as {before}, {'also when attacked' if after == before else f'attacked as {after}'}"
        margins = "margin {:+.2f}, attacked {:+.2f}".format(*shown.margins)
        line = element("p", element("b", SIGNS[sign], class_=f"is-{sign}"), f" {shown.label}: {fate}",
                       element("br"), element("span", f"{margins}, test image {shown.index}"))  # fmt: skip
        cells.append(element("div", element("div", pictures, class_="three"), line, class_="card"))
    return [soft(told), element("div", cells, class_="grid-images")]
