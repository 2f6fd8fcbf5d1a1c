"""The pages of the documentation's site that are made from the code: a hook of mkdocs (mkdocs.yml).

The README is the first page; recipes, options and ops are listed from what they say of themselves, each op with
its rows of the committed benchmark. Nothing of this is kept in the repository, so none of it can be out of date.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) for folder in (".", "kernels", "bench", "docs"))
TEXT = ("CONTRIBUTING.md", "CHANGELOG.md")  # of the repository's root, and pages of the site
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
ARROWS = "; those that follow from others are left out above"
LEFT_OUT = ("op", "quartiles_us", "implementation")  # of the benchmark's columns; performance.md has them
DIAGRAM = re.compile(r"```mermaid\n.*?```\n", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """The generated pages among those that are there (an event of mkdocs)."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **of: Any) -> str:
    """A page of docs/ as the site has it (an event of mkdocs): documents of the repository's root are pages beside
    it, and the one diagram, for which a browser would need a program from elsewhere, is drawn without arrows."""
    for name in TEXT:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return DIAGRAM.sub(lambda _: "\n".join(house()) + "\n", markdown.replace(ARROWS, ""))


def house() -> Iterator[str]:
    """The floors and their rooms, from the top."""
    import floors

    yield '<div class="house">'
    for number, rooms in reversed(list(enumerate(floors.FLOORS))):
        names = "".join(f"<b>{room}</b>" for room in rooms if room != "package")
        yield f"<div><span>floor {number}</span>{names}</div>"
    yield "</div>"


def pages() -> dict[str, str]:
    """Every generated page's path and Markdown."""
    sys.path[:0] = [folder for folder in OURS if folder not in sys.path]
    taken = {name: (ROOT / name).read_text(encoding="utf-8") for name in TEXT if (ROOT / name).exists()}
    return {
        "index.md": moved((ROOT / "README.md").read_text(encoding="utf-8"), ""),
        **{name: moved(content, "") for name, content in taken.items()},
        "reference/recipes.md": "\n".join(recipes()),
        "reference/options.md": "\n".join(options()),
        "reference/ops.md": "\n".join(ops()),
    }


def moved(text: str, folder: str) -> str:
    """A document of the repository's root with its links as they are from the site's `folder`; what is no page of
    the site is named without a link."""

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if target.startswith("docs/") or target in TEXT:
            return f"[{words}]({posixpath.relpath(target.removeprefix('docs/'), folder or '.')}{anchor})"
        return match[0] if (ROOT / "docs" / target).exists() else words

    return LINK.sub(link, text)


def recipes() -> Iterator[str]:
    """Every recipe by its table, with its first line."""
    from mwpb_fast.config import all_recipes, load

    yield "# Recipes"
    yield "\n`mwpb-fast train RECIPE` trains one; `mwpb-fast train RECIPE --help` shows every value of it."
    module = ""
    for name in all_recipes():
        stem, _, function = name.rpartition(".")
        source = load("recipes", stem)
        if stem != module:
            yield f"\n## {stem}\n\n{inspect.cleandoc(source.__doc__ or '')}\n\n| recipe | what it is |\n|---|---|"
            module = stem
        yield f"| `{name}` | {_first_line(vars(source)[function])} |"


def options() -> Iterator[str]:
    """Every option of a run: its type, its default, and what the class that holds it says of it."""
    from mwpb_fast.config import AXES, Config, load, names

    yield "# Options"
    yield "\nEach is an option of `mwpb-fast train` and a key of its YAML file: `--optim.lr 0.05`."
    held = [f for f in dataclasses.fields(Config) if f.name != "recipe" and f.name not in AXES]
    groups = [(f.name, f.default) for f in held if dataclasses.is_dataclass(f.default)]
    yield from _group("A run", Config, [f for f in held if f.name not in {*dict(groups), "data"}], "")
    yield from _group("data", *_class_and_fields(load("data", "dataset").Config), "data.")
    for name, value in groups:
        yield from _group(name, *_class_and_fields(type(value)), f"{name}.")
    for folder in dict.fromkeys(AXES.values()):
        axes = [axis for axis, of in AXES.items() if of == folder]
        yield f"\n## {' and '.join(f'`--{axis}`' for axis in axes)}"
        for name in names(folder):
            yield from _group(name, *_class_and_fields(load(folder, name).Config), f"{axes[-1]}.", level="###")


def ops() -> Iterator[str]:
    """Every public function of mwpb_kernels, with its rows of the benchmark on the CPU."""
    import mwpb_kernels

    found = json.loads((ROOT / "bench" / "results" / "kernels-cpu.json").read_text(encoding="utf-8"))
    yield "# Ops"
    yield (
        "\nOf `mwpb_kernels`: each has a PyTorch reference for every device, C++ for the CPU and Triton for CUDA. "
        f"The rows under an op are those of `{found['command']}` on {found['device']}, commit {found['commit']}."
    )
    for name in mwpb_kernels.__all__:
        function = getattr(mwpb_kernels, name)
        if not inspect.isfunction(function):
            continue
        yield f"\n## {name}\n\n```python\n{_call(name, function)}\n```\n"
        yield f"```text\n{_flowing(function)}\n```\n"
        yield from _bench_rows(found, [row for row in found["rows"] if row["op"] == name])


def _call(name: str, function: Any) -> str:
    """Name and arguments, one a line where a line would be long."""
    signature = inspect.signature(function)
    line = f"{name}{signature}".replace("'", "")
    if len(line) <= 88:
        return line
    arguments: list[str] = []
    kinds = [p.kind for p in signature.parameters.values()]
    for i, parameter in enumerate(signature.parameters.values()):
        if parameter.kind == parameter.KEYWORD_ONLY and parameter.KEYWORD_ONLY not in kinds[:i]:
            arguments.append("*")
        arguments.append(str(parameter))
    returned = inspect.formatannotation(signature.return_annotation)
    lines = "".join(f"\n    {argument}," for argument in arguments)
    return f"{name}({lines}\n) -> {returned}".replace("'", "")


def _bench_rows(found: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = found["columns"]["large"] if isinstance(found["columns"], dict) else found["columns"]
    kept = [c for c in columns if rows and rows[0].get(c[0]) is not None and c[0] not in LEFT_OUT]
    if rows:
        rule = "".join("|--:" if form else "|---" for _, _, form in kept)
        yield f"| {' | '.join(title for _, title, _ in kept)} |\n{rule}|"
    for row in rows:
        yield "| " + " | ".join(_cell(row.get(key), form) for key, _, form in kept) + " |"


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form) if form else str(value)


def _class_and_fields(holder: type) -> tuple[type, list[Any]]:
    return holder, list(dataclasses.fields(holder))


def _group(title: str, holder: type, fields: list[Any], prefix: str, level: str = "##") -> Iterator[str]:
    yield f"\n{level} {title}\n\n```text\n{_flowing(holder)}\n```\n"
    if fields:
        yield "| option | default |\n|---|---|"
    for field in fields:
        yield f"| `--{prefix}{field.name}` | {_default(field)} |"


def _default(field: Any) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "the recipe's"
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"  # as the command line and YAML have it
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value)) or '[]'}`"
    return f"`{value}`" if isinstance(value, Fraction | str) and value != "" else f"`{value!r}`"


def _flowing(documented: Any) -> str:
    """A docstring whose full lines go on in the next one, so that a browser breaks them where it likes."""
    lines: list[str] = []
    before = ""
    for line in inspect.cleandoc(documented.__doc__ or "").splitlines():
        if len(before) > 80 and line[:1].strip(" *-"):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
        before = line
    return "\n".join(lines)


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0].replace("|", "\\|")
