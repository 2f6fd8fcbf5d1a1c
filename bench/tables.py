"""Renders the tables of the documentation from the result files in bench/results; none is ever typed.

In the document, `<!-- table: NAME [optional] [first=N] [columns=KEY,KEY] [key=value ...] -->` and `<!-- end -->`
enclose the table of bench/results/NAME.json, of the first N of the rows that have these values, all columns or
those; the lines between are replaced. A result file holds `columns` (key, title, format) and `rows`, and says
where it was measured (see measure.py); columns that differ by the rows' kind are chosen by kind=. A file that
lists what is unfinished, or why it failed, gives the rows that it has, and says so, but for an excerpt that has
its N rows; where what it is of has changed since its commit, that is said, too. An optional table whose file is
not there says that it was not yet measured. `<!-- text: NAME -->` encloses bench/results/NAME.md, as
`mwpb-fast reproduce` wrote it, without its title; `<!-- standing -->` the table of standing.py, and
`<!-- crossover: NAME -->` what crossover.py reckons from bench/results/NAME.json.

    python bench/tables.py           rewrite the documents
    python bench/tables.py --check   exit with 1 if that would change it
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import crossover
import standing

from mwpb_fast.system.text_tables import markdown

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: (?P<name>\S+)(?P<filters>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

TEXT = re.compile(r"(<!-- text: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
CROSSOVER = re.compile(r"(<!-- crossover: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
STANDING = re.compile(r"(<!-- standing -->\n).*?(<!-- end -->)", re.DOTALL)
OLDER = "older than the code"
# What a benchmark measures, by its name; the others measure what a step is made of.
STEP = (
    *(f"mwpb_fast/{room}" for room in ("attacks", "budgets", "engine", "models", "objectives", "perturbations")),
    *(f"mwpb_fast/{name}.py" for name in ("capture", "inner_losses", "method", "optim", "step")),
    "kernels",
)
MEASURED = {
    "kernels": ("kernels",),
    "loaders": ("mwpb_fast/data",),
    "busy": ("mwpb_fast/system", *STEP),
    "torture": ("mwpb_fast/data", "mwpb_fast/runs", "mwpb_fast/system", "mwpb_fast/train.py", "kernels"),
}
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("performance", "reliability", "reproduce", "scaling")),
)


def cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (format(value, form) if form else str(value)).replace("|", "\\|")


@cache
def changed(commit: str, paths: tuple[str, ...]) -> bool | None:
    """Whether the files are other ones in this checkout than in the commit; None where git cannot tell, such as in
    a copy without its history."""
    command = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *paths]
    try:
        return {0: False, 1: True}.get(subprocess.run(command, capture_output=True).returncode)
    except OSError:
        return None


def older(content: dict[str, Any], before: str) -> bool:
    """Whether what a result file is of has changed since; what the lines `before` say, where git cannot tell."""
    script = re.search(r"bench/(\w+)\.py", content["command"])
    found = changed(content["commit"].split()[0], MEASURED.get(script[1] if script else "", STEP))
    return OLDER in before if found is None else found


def table(content: dict[str, Any], filters: dict[str, str], before: str) -> str:
    """A result file as a Markdown table, with where and how it was measured below; numbers to the right. before:
    the lines that it replaces."""
    first, chosen = int(filters.pop("first", len(content["rows"]))), filters.pop("columns", "")
    rows = [r for r in content["rows"] if all(str(r.get(k)) == v for k, v in filters.items())][:first]
    missing = content.get("failed") or ""
    if content.get("unfinished"):
        missing += f"{'; ' if missing else ''}without {', '.join(content['unfinished'])}"
    if missing and not rows:
        return f"Not measured: {missing}."
    if len(rows) == first < len(content["rows"]):
        missing = ""
    if not rows:
        raise ValueError(f"no row has {filters}")
    columns = content["columns"]
    if isinstance(columns, dict):
        columns = columns[filters.get("kind", "")]
    named = {c[0]: c for c in columns if chosen or c[0] not in filters}
    columns = [named[name] for name in chosen.split(",")] if chosen else list(named.values())
    cells = [[cell(row.get(key), form) for key, _, form in columns] for row in rows]
    numbers = [i for i, (_, _, form) in enumerate(columns) if form]
    lines = markdown([title for _, title, _ in columns], cells, right=numbers)
    return "\n".join((*lines, "", (f"Incomplete ({missing}). " if missing else "") + measured(content, before)))


def measured(content: dict[str, Any], before: str) -> str:
    """Where and how a result file was measured, and whether it is older than the code."""
    source = "; ".join(str(content[k]) for k in ("device", "versions", "date") if content.get(k))
    past = f"; {OLDER}, which has changed since that commit" if older(content, before) else ""
    return f"{source}; commit {content['commit']}; `{content['command']}`{past}."


def rendered(text: str, results: Path) -> str:
    """The document with every enclosed table and text made anew."""

    def included(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.md"
        try:
            _, _, body = path.read_text(encoding="utf-8").partition("\n")
        except OSError as error:
            raise SystemExit(f"{path}: {error.strerror}") from None
        return f"{match[1]}{body.strip()}\n{match[3]}"

    def replacement(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        words = match["filters"].split()
        if "optional" in words and not path.exists():
            return f"{match[1]}Not yet measured.\n{match[4]}"
        try:
            filters = dict(word.split("=", 1) for word in words if word != "optional")
            return f"{match[1]}{table(json.loads(path.read_bytes()), filters, match[0])}\n{match[4]}"
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(f"{path}: {error}") from None

    def stands(match: re.Match[str]) -> str:
        before = match[0].splitlines()

        def past(row: str, content: dict[str, Any]) -> str:
            was = "\n".join(line for line in before if line.startswith(row))
            return f"; {OLDER}" if older(content, was) else ""

        lines = markdown(standing.COLUMNS, standing.rows(results, past))
        return "\n".join((match[1].rstrip(), *lines, match[2]))

    def crosses(match: re.Match[str]) -> str:
        content = json.loads((results / f"{match['name']}.json").read_bytes())
        lines = markdown(crossover.COLUMNS, crossover.rows(content), right=range(1, len(crossover.COLUMNS)))
        return "\n".join((match[1].rstrip(), *lines, "", measured(content, match[0]), match[3]))

    return STANDING.sub(stands, CROSSOVER.sub(crosses, TEXT.sub(included, TABLE.sub(replacement, text))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--document", type=Path, nargs="+", default=DOCUMENTS)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a table is out of date"
    )
    options = parser.parse_args()
    for document in options.document:
        before = document.read_text(encoding="utf-8")
        after = rendered(before, options.results)
        if options.check and after != before:
            sys.exit(f"{document}: tables are out of date; run python bench/tables.py")
        if after != before:
            document.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
