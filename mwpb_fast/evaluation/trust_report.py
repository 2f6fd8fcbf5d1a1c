"""A trust report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mwpb_fast.system import text_tables

TITLES = {
    "natural": "no attack",
    "weighted": "PGD-20, the run's own radii",
    "aa": "AutoAttack, uniform radius",
    "pgd20": "PGD-20, uniform radius",
    "fgsm": "FGSM, uniform radius",
    "square": "Square (black box), uniform radius",
}
UNEQUAL = {
    "pgd20": "the same radius for every image",
    "pgd20-weighted": "larger for large margins, as MWPB has it",
    "pgd20-reversed": "larger for the vulnerable",
}
MORE = {
    "pgd10": "PGD-10",
    "pgd20": "PGD-20",
    "pgd50": "PGD-50",
    "pgd100": "PGD-100",
    "pgd20x5": "PGD-20, the worst of 5 starts",
}


def markdown(report: dict[str, Any]) -> str:
    """Title, result tables, verdicts. report: as `trust.judge` returns it."""
    attacks, control = report["attacks"], report.get("control")
    beside = control["attacks"] if control else {}
    name = report.get("recipe") or report.get("checkpoint") or "a model"
    eps = in_255(report["eps"])
    preview = f" **Preview: {report['n']} images, not the whole test set.**" if report["preview"] else ""
    lines = [
        f"# Trust report: {name}",
        "",
        f"{report['n']} images, {report['norm']}, eps {eps}, step {in_255(report['step_size'])}.{preview}",
        "",
    ]
    header = ["result", "accuracy", "95 % interval"] + (["control"] if control else [])

    def rows(titles: dict[str, str]) -> list[list[str]]:
        found = []
        for key, title in titles.items():
            if key in attacks:
                other = [f"{beside[key]['accuracy']:.2f} %" if key in beside else "-"] if control else []
                found.append([title, *_numbers(attacks[key]), *other])
        return found

    lines += _table(header, rows(TITLES))
    if control:
        lines += [f"Control: {control['path']}, {control['n']} images.", ""]
    radius = report["measures"]["radius"]
    span = ", ".join(f"{kind} {255 * radius[kind]:.2f}/255" for kind in ("min", "mean", "max"))
    lines += [f"The run's own radii on these images: {span}.", ""]
    lines += _table(
        ["radius", "step", "accuracy under PGD-20", "95 % interval"], [_swept(attacks[n]) for n in report["sweep"]]
    )
    lines += _table(
        ["steps and starts", "accuracy", "95 % interval"],
        [[title, *_numbers(attacks[key])] for key, title in MORE.items() if key in attacks],
    )
    if "pgd20-weighted" in attacks or "pgd20-reversed" in attacks:
        lines += [f"Another threat model: radii of mean {eps}, given out by the margin of each image.", ""]
        lines += _table(["PGD-20", *header[1:]], rows(UNEQUAL))
    for name, attack in attacks.items():
        lines += [f"{name} departs from the standard: {text}." for text in attack.get("deviations", [])]
    lines += [*([""] if lines[-1] else []), "## Verdicts", ""]
    lines += [f"- {v['verdict']}: {v['check']}: {v['text']}" for v in report["verdicts"]]
    return "\n".join(lines)


def in_255(eps: str) -> str:
    """A radius in 255ths."""
    return f"{float(Fraction(eps) * 255):g}/255"


def _numbers(entry: dict[str, Any]) -> list[str]:
    return [f"{entry['accuracy']:.2f} %", "{:.2f} to {:.2f}".format(*entry["interval"])]


def _swept(entry: dict[str, Any]) -> list[str]:
    return [in_255(entry["eps"]), in_255(entry["step_size"]), *_numbers(entry)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [*text_tables.markdown(header, rows, padded=True), ""]
