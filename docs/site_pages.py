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
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) for folder in (".", "kernels", "bench"))
TEXT = ("CONTRIBUTING.md", "CHANGELOG.md")  # of the repository's root, and pages of the site
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """The generated pages among those that are there (an event of mkdocs)."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


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
        target, anchor = match[1], match[2] or ""
        if target.startswith("docs/") or target in TEXT:
            return f"]({posixpath.relpath(target.removeprefix('docs/'), folder or '.')}{anchor})"
        return match[0] if (ROOT / "docs" / target).exists() else "](#)"

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
        yield f"\n# {' and '.join(f'`--{axis}`' for axis in axes)}"
        for name in names(folder):
            yield from _group(name, *_class_and_fields(load(folder, name).Config), f"{axes[-1]}.")


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
        yield f"\n## {name}\n\n```python\n{name}{inspect.signature(function)}\n```\n"
        yield f"```text\n{inspect.cleandoc(function.__doc__ or '')}\n```\n"
        yield from _bench_rows(found, [row for row in found["rows"] if row["op"] == name])


def _bench_rows(found: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = found["columns"]["large"] if isinstance(found["columns"], dict) else found["columns"]
    kept = [c for c in columns if rows and rows[0].get(c[0]) is not None and c[0] != "op"]
    if rows:
        yield "| " + " | ".join(title for _, title, _ in kept) + " |\n" + "|---" * len(kept) + "|"
    for row in rows:
        yield "| " + " | ".join(_cell(row.get(key), form) for key, _, form in kept) + " |"


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form) if form else str(value)


def _class_and_fields(holder: type) -> tuple[type, list[Any]]:
    return holder, list(dataclasses.fields(holder))


def _group(title: str, holder: type, fields: list[Any], prefix: str) -> Iterator[str]:
    yield f"\n## {title}\n\n```text\n{textwrap.dedent(inspect.cleandoc(holder.__doc__ or ''))}\n```\n"
    if fields:
        yield "| option | default |\n|---|---|"
    for field in fields:
        yield f"| `--{prefix}{field.name}` | {_default(field)} |"


def _default(field: Any) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "the recipe's"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value)) or '[]'}`"
    return f"`{value}`" if isinstance(value, Fraction | str) and value != "" else f"`{value!r}`"


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0].replace("|", "\\|")
