"""The parts of a page that are about one run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from mwpb_fast.evaluation.trust_report import in_255
from mwpb_fast.report import curves
from mwpb_fast.report.compare import Difference
from mwpb_fast.report.judged import WORDS, headline, judge, trust_report
from mwpb_fast.report.markup import Markup, details, element, join, table
from mwpb_fast.report.read import Attack, Result, Run
from mwpb_fast.system.units import counted, duration

SIGNS = {"ok": "\u2713", "doubt": "\u2717", "open": "?", "none": "?"}


def soft(sentence: str) -> Markup:
    return element("p", sentence, class_="soft")


def percent(attack: Attack | None) -> str:
    if attack is None:
        return ""
    return f"{attack.accuracy:.2f} % ({attack.interval[0]:.1f} to {attack.interval[1]:.1f})"


def departures(run: Run) -> str:
    """Whether the run is what its name says, where there is something to say."""
    if run.changed is None:
        return "This version has no such recipe, so whether the run departs from it is not known."
    return f"Changed from the recipe: {'; '.join(run.changed)}." if run.changed else ""


# what it is, and whether it can be trusted -----------------------------------------------------------------------
def what(run: Run) -> Markup:
    """A run in one sentence."""
    name, data = run.option("model.name", "?"), run.option("data.name", "?")
    method = f"{axis(run, 'objective')} with budget {axis(run, 'budget')}, attack {axis(run, 'attack')}"
    about = soft(f"{name} on {data}: {method}. {_when(run)}Folder {run.folder}")
    told = departures(run)
    return join(element("p", element("b", told), class_="is-open") if told else None, about)


def _when(run: Run) -> str:
    if run.until is None:
        return ""
    seconds = sum(value for _, value in run.column("seconds"))
    spent = f", {duration(seconds)} in training steps" if seconds else ""
    return f"Trained until {datetime.fromtimestamp(run.until, UTC):%Y-%m-%d %H:%M} UTC{spent}. "


def ball(result: Result) -> str:
    """The norm and radius of an evaluation."""
    return f"{result.norm} {in_255(str(result.eps)) if result.norm == 'linf' else result.eps}"


def axis(run: Run, name: str) -> str:
    """A module of an axis, with its options that matter most."""
    found = run.option(name, {})
    if not isinstance(found, Mapping):
        return str(found)
    told = [f"{key} {found[key]}" for key in ("eps", "alpha", "beta", "steps", "form", "share") if key in found]
    plain = [text for text in told if text not in ("form plain", "share own")]
    options = f" ({', '.join(plain)})" if plain else ""
    return f"{found.get('name', '?')}{options}"


def first(run: Run) -> Markup:
    """The numbers and the judgement."""
    found = judge(run)
    result = found.headline
    if result is None:
        columns = [(kind, run.column(kind)) for kind in ("robust", "natural")]
        shown = [_big(column[-1][1], kind, f"epoch {column[-1][0]:.0f}") for kind, column in columns if column]
        text = "Validation: held-out training images, PGD-10." if shown else "Nothing to show yet."
        numbers = join(element("div", shown, class_="numbers"), soft(text))
    else:
        shown = [
            _big(attack.accuracy, name, "95 %: {:.1f} to {:.1f}".format(*attack.interval))
            for name, attack in ((f"robust at {ball(result)}", found.robust), ("natural", found.natural))
            if attack is not None
        ]
        under = f", {found.robust.ball}" if found.robust else ""
        epoch = f", epoch {result.epoch}" if result.epoch is not None else ""
        numbers = join(
            element("div", shown, class_="numbers"),
            soft(f"Worst case{under}; {counted(result.n, 'test image')}; "
                 f"{result.which} checkpoint{epoch}."),
        )  # fmt: skip
    reasons = [
        element("li", element("b", SIGNS[level], class_=f"is-{level}"), _with_command(reason))
        for level, reason in found.reasons
    ]
    judgement = join(
        element("p", f"{SIGNS[found.level]} {WORDS[found.level]}", class_=f"level is-{found.level}"),
        element("ul", reasons, class_="reasons"),
    )
    left = element("section", element("h2", "How good?"), numbers, class_="card")
    right = element("section", element("h2", "Can it be believed?"), judgement, class_="card")
    return element("div", left, right, class_="first")


def _with_command(reason: str) -> Markup:
    """A reason, whose command can be told from its words."""
    said, name, rest = reason.partition("mwpb-fast ")
    return join(said, element("code", name + rest) if name else None)


def _big(value: float, name: str, under: str) -> Markup:
    number = element("div", f"{value:.1f}", element("small", " %"), class_="big")
    return element("div", number, name, element("div", under, class_="soft"))


def facts(run: Run) -> Markup:
    """What the run is, in pairs of name and value."""
    warmup = run.count("warmup_epochs")
    phases = f", of them {warmup} of warm-up with {axis(run, 'warmup')}" if warmup else ""
    pairs = [
        ("Model", run.option("model.name", "?")),
        ("Data", run.option("data.name", "?")),
        ("Objective", axis(run, "objective")),
        ("Budget", axis(run, "budget")),
        ("Attack in training", axis(run, "attack")),
        ("Weight perturbation", axis(run, "perturbation")),
        ("Epochs", f"{run.last_epoch} of {run.count('epochs')}{phases}"),
        ("Seed", run.option("seed", "?")),
        ("Device", run.environment.get("device", "?")),
    ]
    listed = element("dl", [element("div", element("dt", name), element("dd", value)) for name, value in pairs])
    return join(listed, soft(f"Missing or left out: {'; '.join(run.problems)}.") if run.problems else None)


# the evaluation -----------------------------------------------------------------------------------------------
def evaluation(run: Run) -> list[Markup]:
    result, trust = headline(run), trust_report(run)
    if result is None:
        return [soft(f"There is none yet: mwpb-fast evaluate {run.folder}")]
    found = [_attacks(result)]
    lines = [f"{attack.name} departs from the standard: {text}" for attack in result.attacks.values()
             for text in attack.deviations]  # fmt: skip
    lines += [f"warning ({kind}): {message}" for kind, message in result.warnings.items()]
    found += [element("p", line) for line in [*lines, *result.notes]]
    if trust is not None:
        chart = curves.sweep(trust.sweep)
        found += [element("div", chart, class_="charts")] if chart else []
        found.append(_verdicts(trust))
    for other in run.results:
        if other is not result and (other is not trust or trust is not result):
            found.append(details(f"{other.file}: {other.which} checkpoint, {other.n:,} images", _attacks(other)))
    return found


def _attacks(result: Result) -> Markup:
    rows = []
    for attack in result.attacks.values():
        if attack.probe:
            continue
        seconds = "" if attack.seconds is None else f"{attack.seconds:,.1f}"
        name = "worst case" if attack is result.worst else attack.name
        low, high = attack.interval
        rows.append([name, f"{attack.accuracy:.2f} %", f"{low:.2f} to {high:.2f}",
                     _bar(low, attack.accuracy, high), attack.ball, f"{attack.n:,}", seconds])  # fmt: skip
    header = ["attack", "accuracy", "95 % interval", "0 to 100 %", "ball", "images", "seconds"]
    state = " It is of another checkpoint than the run has now." if result.stale else ""
    part = ", a preview" if result.preview else ""
    caption = f"{result.file}: {result.which} checkpoint, {result.n:,} test images{part}.{state}"
    return table(header, rows, caption)


def _bar(low: float, middle: float, high: float) -> Markup:
    """An interval in 0 to 100."""
    line = element("path", d="M0 9H190", class_="grid", stroke_width=2)
    whisker = element("rect", x=f"{1.9 * low:.1f}", y=5, width=f"{max(1.9 * (high - low), 1.5):.1f}", height=8,
                      class_="fill c0", opacity=0.35)  # fmt: skip
    dot = element("circle", cx=f"{1.9 * middle:.1f}", cy=9, r=4, class_="fill c0")
    return element("svg", line, whisker, dot, viewBox="0 0 190 18", aria_hidden="true")


def difference_bar(found: Difference) -> Markup:
    """A difference with its interval, in -20 to 20 points, or cut off there."""
    low, middle, high = (
        95 + 4.75 * max(-20.0, min(20.0, v)) for v in (found.interval[0], found.points, found.interval[1])
    )
    lines = [
        element("path", d="M0 9H190", class_="grid", stroke_width=2),
        element("path", d="M95 1V17", class_="axis"),
    ]
    css = "c0" if found.points >= 0 else "c1"
    whisker = element("rect", x=f"{low:.1f}", y=5, width=f"{max(high - low, 1.5):.1f}", height=8,
                      class_=f"fill {css}", opacity=0.35)  # fmt: skip
    dot = element("circle", cx=f"{middle:.1f}", cy=9, r=4, class_=f"fill {css}")
    return element("svg", lines, whisker, dot, viewBox="0 0 190 18", aria_hidden="true")


def _verdicts(trust: Result) -> Markup:
    level = {"ok": "ok", "note": "ok", "doubt": "doubt"}
    rows = []
    for check, verdict, text in trust.verdicts:
        name = level.get(verdict, "open")
        rows.append(
            [check, element("span", f"{SIGNS[name]} {verdict}", class_=f"is-{name}"), element("span", text)]
        )
    inner = table(["check", "verdict", "what was found"], rows, f"{trust.file}: {trust.n:,} images", wide=True)
    return details("All checks of the trust report", inner)
