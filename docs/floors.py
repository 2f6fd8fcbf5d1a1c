"""The floors of mwpb_fast, and their picture in docs/architecture.md, drawn from what the code imports.

A room is a module or a folder of `mwpb_fast/`. It imports from rooms on the floors below its own and, if it is a
folder, from inside itself; tests/test_repository.py holds every file to that.

    python docs/floors.py           draw the picture anew
    python docs/floors.py --check   exit with 1 if that would change it
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "mwpb_fast"
DOCUMENT = ROOT / "docs" / "architecture.md"
MARKED = re.compile(r"(<!-- floors -->\n).*?(<!-- end -->)", re.DOTALL)

# From the ground up. `package` is mwpb_fast's own __init__.
FLOORS = (
    ("method", "meant"),
    ("system", "config", "models"),
    ("data", "budgets", "inner_losses", "optim", "engine"),
    ("runs", "attacks", "step", "perturbations"),
    ("capture", "evaluation", "objectives"),
    ("choice", "export", "report"),
    ("options", "recipes", "train"),
    ("reproduce",),
    ("cli", "package"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports anywhere, as a dotted name (with the imported name), and the line."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{a.name}", node.lineno) for a in node.names)


def room_of(path: Path) -> str:
    """The room that a file of mwpb_fast is, or is in."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return "package" if parts == ("__init__",) else parts[0]


def arrows() -> dict[str, set[str]]:
    """By room, the rooms that it imports from."""
    found: dict[str, set[str]] = {}
    for path in sorted(HOUSE.rglob("*.py")):
        mine = found.setdefault(room_of(path), set())
        for name, _ in imports(path):
            top, *rest = name.split(".")
            if top == "mwpb_fast" and rest and rest[0] != room_of(path):
                mine.add(rest[0])
    return found


def told(room: str) -> str:
    """The first sentence of a room's docstring."""
    path = HOUSE / room / "__init__.py" if (HOUSE / room).is_dir() else HOUSE / f"{room}.py"
    paragraph = (ast.get_docstring(parsed(path)) or "").partition("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(paragraph.split()))[0]


def beyond(room: str, to: dict[str, set[str]]) -> set[str]:
    """The rooms that a room reaches through others."""
    return {further for below in to.get(room, ()) for further in to.get(below, set()) | beyond(below, to)}


def picture() -> str:
    """A diagram with the arrows that do not follow from others, and a table with all of them."""
    to = {room: below for room, below in arrows().items() if room != "package"}
    rooms = {number: [room for room in names if room in to] for number, names in enumerate(FLOORS)}
    lines = ["```mermaid", "flowchart TB"]
    for number in reversed(rooms):
        lines += [
            f'  subgraph floor{number}["floor {number}"]',
            *(f"    {room}" for room in rooms[number]),
            "  end",
        ]
    for number in reversed(rooms):
        for room in rooms[number]:
            lines += [f"  {room} --> {below}" for below in sorted(to[room] - beyond(room, to))]
    count = sum(map(len, to.values()))
    lines += ["```", "", f"{len(to)} rooms, {count} arrows; those that follow from others are left out above.", ""]
    # Not by mwpb_fast.system.text_tables: the floors are drawn and checked also where the package does not import.
    lines += ["| floor | room | what it is | imports from |", "|--:|---|---|---|"]
    for number in reversed(rooms):
        for room in rooms[number]:
            below = ", ".join(sorted(to[room], key=lambda r: (-FLOOR.get(r, 0), r))) or "nothing"
            lines.append(f"| {number} | `{room}` | {told(room)} | {below} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if it is out of date")
    options = parser.parse_args()
    before = DOCUMENT.read_text(encoding="utf-8")
    after = MARKED.sub(lambda match: f"{match[1]}{picture()}\n{match[2]}", before)
    if options.check and after != before:
        sys.exit(f"{DOCUMENT}: the floors are out of date; run python docs/floors.py")
    if after != before:
        DOCUMENT.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
