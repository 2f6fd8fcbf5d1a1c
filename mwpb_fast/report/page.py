"""The page: what a run is and whether it can be trusted, then everything else; several runs beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from mwpb_fast.report import compare, curves, machine, parts, training
from mwpb_fast.report.images import Looked
from mwpb_fast.report.judged import WORDS, headline, judge
from mwpb_fast.report.markup import Markup, details, element, join, table
from mwpb_fast.report.read import Run
from mwpb_fast.report.seeds import Method, grouped, over_seeds, pooled
from mwpb_fast.report.style import STYLE
from mwpb_fast.runs.log import own_version

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # whatever a name may hold, nothing is fetched
)


def page(runs: Sequence[Run], looked: Sequence[Looked | str]) -> str:
    """The whole file. looked: for each run what `images.look` found, or why there is nothing."""
    methods = grouped(runs)
    title = _title(runs[0]) if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.label for run in runs)}"
    body = _one(runs[0], looked[0]) if len(runs) == 1 else _several(runs, methods, looked)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", f"{title} - mwpb-fast report"),
        element("style", Markup(STYLE)),
    )
    made = f"mwpb-fast {own_version()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. One file, nothing is loaded."
    skip = element("a", "to the content", href="#content", class_="skip")
    inner = element("body", skip, body, element("footer", made))
    return "<!DOCTYPE html>\n" + element("html", head, inner, lang="en")


def _title(run: Run) -> str:
    return f"{run.label}, changed" if run.changed else run.label


def _navigation(links: Sequence[tuple[str, str]]) -> Markup:
    anchors = [element("a", name, href=f"#{target}") for target, name in links]
    return element("nav", anchors, aria_label="sections")


def _section(key: str, title: str, *inside: Markup | str | None, level: str = "h2") -> Markup:
    return element("section", element(level, title), *inside, id=key)


def _one(run: Run, looked: Looked | str) -> Markup:
    sections = _sections(run, looked, [run])
    links = [(key, title) for key, title, _ in sections]
    top = element("header", element("h1", _title(run)), parts.what(run), _navigation(links))
    content = [_section(key, title, *inside) for key, title, inside in sections]
    return join(top, element("main", parts.first(run), parts.facts(run), *content, id="content"))


def _several(runs: Sequence[Run], methods: Sequence[Method], looked: Sequence[Looked | str]) -> Markup:
    links = [("compared", "Compared"), ("learning", "Learning")]
    links += [(f"run{i}", run.label) for i, run in enumerate(runs)]
    top = element("header", element("h1", f"{len(runs)} runs side by side"), _navigation(links))
    learning = element("div", *curves.learning(runs), *curves.speed(runs), class_="charts")
    inside = (*over_seeds(methods), _overview(runs), *_paired(methods), _differing(methods))
    content = [
        _section("compared", "Compared", *inside),
        _section("learning", "Learning", learning),
    ]
    for i, (run, found) in enumerate(zip(runs, looked, strict=True)):
        own = [
            _section(f"run{i}-{key}", title, *inner, level="h3")
            for key, title, inner in _sections(run, found, runs)
        ]
        content.append(_section(f"run{i}", _title(run), parts.what(run), parts.first(run), parts.facts(run), *own))
    return join(top, element("main", *content, id="content"))


def _sections(run: Run, looked: Looked | str, runs: Sequence[Run]) -> list[tuple[str, str, list[Markup]]]:
    """(key, title, content) of everything about one run below its head."""
    found = [("evaluation", "Evaluation", parts.evaluation(run))]
    if len(runs) == 1:
        found.append(("learning", "Learning", training.learning(run)))
    found += [
        ("radii", "Radii", training.radii(run, looked)),
        ("classes", "Classes", training.classes(run)),
        ("images", "Images", training.grid(looked)),
        ("machine", "Speed and engine", machine.machine(run, alone=len(runs) == 1)),
        ("configuration", "Configuration", machine.configuration(run)),
    ]
    return found


def _overview(runs: Sequence[Run]) -> Markup:
    """A row a run: what stands first in each one's own part. Where not all were attacked alike, the worst case
    over the attacks that all have goes before each one's own."""
    judged = [judge(run) for run in runs]
    results = [found.headline for found in judged if found.headline and found.robust]
    alike = all(compare.attacked(result) == compare.attacked(results[0]) for result in results)
    common = [] if alike else compare.shared(results)
    rows = []
    for i, (run, found) in enumerate(zip(runs, judged, strict=True)):
        result, own = found.headline, parts.percent(found.robust)
        result = result if found.robust else None
        over = f"{', '.join(compare.attacked(result))} at {parts.ball(result)}" if result else ""
        level = element("span", parts.SIGNS[found.level], " ", WORDS[found.level], class_=f"is-{found.level}")
        natural = parts.percent(found.natural)
        if common:
            cells = [parts.percent(compare.worst_of(result, common)) if result else "", natural, level, own]
        else:
            cells = [own, natural, level]
        shown = found.headline
        what = f"{shown.n:,}{', a preview' if shown.preview else ''}" if shown else ""
        told = parts.departures(run)
        name = join(
            element("span", class_=f"key {run.colour}"),
            element("a", run.label, href=f"#run{i}"),
            element("div", told, class_="told is-open") if told else None,
        )
        epochs = f"{run.last_epoch} of {run.count('epochs')}"
        rows.append([name, *cells, element("span", over, class_="wrap"), what, epochs, run.option("seed", "")])
    robust = [f"robust, worst of {', '.join(common)}"] if common else ["robust"]
    own_name = ["own worst case"] if common else []
    header = ["run", *robust, "natural", "can it be believed?", *own_name, "worst of", "test images", "epochs",
              "seed"]  # fmt: skip
    shown_table = table(header, rows, "best checkpoint of each, with 95 % intervals", stack=True)
    return join(shown_table, None if alike else element("p", _unlike(common), class_="is-open"))


def _unlike(common: Sequence[str]) -> str:
    """What to say of runs that were not all attacked alike."""
    if not common:
        return (
            "The runs were not attacked alike, and no attack at one radius is in the worst case of all of them: "
            "their robust accuracies are not to be compared."
        )
    return (
        f"The runs were not attacked alike. Compare the worst of {', '.join(common)}, which all of them have; a "
        "run's own worst case is over the attacks that stand beside it."
    )


def _differing(methods: Sequence[Method]) -> Markup:
    """The options in which the methods differ, as rows."""
    runs = [next(iter(method.runs.values())) for method in methods]
    options = [compare.options(run.config) for run in runs]
    apart = {"recipe", "data.dir", *(["seed"] if pooled(methods) else [])}
    names = sorted({name for found in options for name in found} - apart)
    rows = [[name, *(found.get(name, "-") for found in options)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return element(
            "p", f"All runs have the same configuration{', but for the seed' if pooled(methods) else ''}."
        )
    keys = [join(element("span", class_=f"key {run.colour}"), run.method) for run in runs]
    return join(element("h3", "What differs"), table(["option", *keys], rows, "of the configurations", wide=True))


def _paired(methods: Sequence[Method]) -> list[Markup]:
    """Differences to the first method's run of the same seed, or to its first run, on the same test images."""
    base, rows = methods[0], []
    first = next(iter(base.runs.values()))
    for seed, run in ((seed, run) for method in methods[1:] for seed, run in method.runs.items()):
        other = base.runs.get(seed, first)
        key = element("span", class_=f"key {run.colour}")
        for found in compare.differences(headline(other), headline(run)):
            low, high = found.interval
            said = "higher" if low > 0 else "lower" if high < 0 else "no clear difference"
            picture = parts.difference_bar(found)
            rows.append([join(key, run.label), found.attack, f"{found.points:+.2f}", f"{low:+.2f} to {high:+.2f}",
                         picture, said, f"{found.n:,}"])  # fmt: skip
    if not rows:
        if len(methods) == 1:
            return []
        return [element("p", f"No result of another run is on the same test images as one of {base.label}, so "
                             "that there is no paired difference.", class_="soft")]  # fmt: skip
    header = ["run", "attack", "points", "95 % interval", "", "", "images"]
    told = (
        "Image by image on the same test images, at the same radius. The interval is over the choice of test "
        "images alone: another seed of training may move a run by more."
    )
    title, shown = f"Against {base.label}, image by image", table(header, rows, "accuracy, in points", stack=True)
    if pooled(methods):  # what is said of the seeds says more
        return [details(title, shown, element("p", told, class_="told"))]
    return [element("h3", title), shown, element("p", told, class_="told")]
