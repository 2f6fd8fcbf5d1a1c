"""Several runs of one configuration that differ in their seed alone: together, and seed by seed against others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mwpb_fast.config.dependence import FREE
from mwpb_fast.evaluation.score import interval, statistics
from mwpb_fast.report import curves
from mwpb_fast.report.compare import options
from mwpb_fast.report.judged import headline, robust_of
from mwpb_fast.report.markup import Markup, element, join, table
from mwpb_fast.report.read import Attack, Result, Run

APART = FREE | {"seed"}  # what does not tell methods apart: nothing else changes how a run trains


@dataclass(frozen=True)
class Method:
    """The runs of one configuration by their seed. number: its place among the methods of a page."""

    number: int
    label: str
    runs: dict[str, Run]


def grouped(runs: Sequence[Run]) -> list[Method]:
    """The methods among the runs; a second run of the same seed is a method of its own. Names and colours of the
    runs are set: one colour a method."""
    found: list[tuple[dict[str, str], dict[str, Run]]] = []
    for run in runs:
        seed = str(run.option("seed", ""))
        own = {name: value for name, value in options(run.config).items() if name not in APART}
        mine = next((by_seed for about, by_seed in found if about == own and seed not in by_seed), None)
        if mine is None:
            found.append((own, mine := {}))
        mine[seed] = run
    names = [next(iter(by_seed.values())).label for _, by_seed in found]
    methods = []
    for number, (name, (_, by_seed)) in enumerate(zip(names, found, strict=True)):
        label = name
        if names.count(name) > 1:  # told apart by where they lie
            label = f"{name} ({next(iter(by_seed.values())).folder})"
        methods.append(Method(number, label, by_seed))
        for seed, run in by_seed.items():
            run.method, run.colour = label, curves.colour(number)
            run.label = f"{label}, seed\u00a0{seed}" if len(by_seed) > 1 else label
    return methods


def pooled(methods: Sequence[Method]) -> bool:
    """Whether a method has several runs."""
    return any(len(method.runs) > 1 for method in methods)


def over_seeds(methods: Sequence[Method]) -> list[Markup]:
    """Mean and deviation of every method, and its differences to the first one seed by seed; nothing where no two
    runs are of one method."""
    if not pooled(methods):
        return []
    rows, differences = [], []
    measure = _measure(methods)
    for method in methods:
        key = join(element("span", class_=f"key {curves.colour(method.number)}"), method.label)
        ours = {kind: _values(method, kind, measure) for kind in ("robust", "natural")}
        rows.append([key, ", ".join(method.runs), *(_spread(list(values.values())) for values in ours.values())])
        for kind, values in ours.items() if method is not methods[0] else ():
            theirs = _values(methods[0], kind, measure)
            both = [values[seed] - theirs[seed] for seed in values if seed in theirs]
            found = statistics(both)
            if found["mean"] is not None:
                differences.append([key, kind, f"{found['mean']:+.2f}", *_said(interval(found)), f"{len(both)}"])
    told = (
        "Mean ± sample standard deviation over the seeds, of the best checkpoints"
        + (f", robust: the worst case {measure[0]}, at {measure[1]}" if measure else "")
        + ". A run with another evaluation is left out."
    )
    header = ["method", "seeds", "robust", "natural"]
    parts = [element("h3", "Over the seeds"), table(header, rows, "accuracy, in %"),
             element("p", told, class_="told")]  # fmt: skip
    if differences:
        header = ["method", "accuracy", "points", "95 % interval", "", "seeds"]
        parts += [element("h3", f"Against {methods[0].label}, seed by seed"),
                  table(header, differences, "accuracy, in points"),
                  element("p", "Student's interval, over the choice of the seeds.", class_="told")]  # fmt: skip
    return [*parts, element("h3", "Each run")]


Measure = tuple[str, str, str, int]  # attacks, ball, checksum of the images, their number


def _measured(result: Result, robust: Attack) -> Measure:
    return robust.ball, f"{result.norm} eps {result.eps}", result.data, result.n


def _measure(methods: Sequence[Method]) -> Measure | None:
    """How most of the runs were attacked: numbers of other attacks are not put together with them."""
    found = [_measured(result, robust) for method in methods for run in method.runs.values()
             if (result := headline(run)) and (robust := robust_of(result))]  # fmt: skip
    return max(found, key=found.count, default=None)


def _values(method: Method, kind: str, measure: Measure | None) -> dict[str, float]:
    """The accuracy of each seed that was measured in this way."""
    values = {}
    for seed, run in method.runs.items():
        result = headline(run)
        robust = robust_of(result) if result else None
        if result is None or robust is None or _measured(result, robust) != measure:
            continue
        attack = robust if kind == "robust" else result.attacks.get("natural")
        if attack is not None:
            values[seed] = attack.accuracy
    return values


def _spread(values: Sequence[float]) -> str:
    found = statistics(values)
    if found["mean"] is None:
        return ""
    return f"{found['mean']:.2f}" + ("" if found["std"] is None else f" ± {found['std']:.2f}")


def _said(ends: Sequence[float] | None) -> tuple[str, str]:
    if ends is None:
        return "", "one seed says nothing of others"
    said = "higher" if ends[0] > 0 else "lower" if ends[1] < 0 else "no clear difference"
    return f"{ends[0]:+.2f} to {ends[1]:+.2f}", said
