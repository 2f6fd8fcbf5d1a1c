"""The documentation's site: what is generated is whole, links lead somewhere, the Python of every page runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import floors
import mwpb_kernels
import pictures
import pytest
import site_pages
import yaml

from mwpb_fast.config import AXES, Config, all_recipes, load, names

ROOT = Path(__file__).resolve().parents[1]
GENERATED = site_pages.pages()
WRITTEN = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {name: site_pages.on_page_markdown(text) for name, text in (WRITTEN | GENERATED).items()}


def test_every_recipe_option_and_op_has_its_place() -> None:
    for name in all_recipes():
        assert f"`{name}`" in GENERATED["reference/recipes.md"]
    listed = GENERATED["reference/options.md"]
    for field in dataclasses.fields(Config):
        assert field.name in {*AXES, "recipe"} or field.name in listed
        if dataclasses.is_dataclass(field.default):
            for own in dataclasses.fields(field.default):
                assert f"`--{field.name}.{own.name}`" in listed
    for axis, folder in AXES.items():
        for name in names(folder) if axis != "warmup" else ():
            for own in dataclasses.fields(load(folder, name).Config):
                assert f"`--{axis}.{own.name}`" in listed
    for name in mwpb_kernels.OPS:
        assert name.endswith("_backward") or f"\n## {name}\n" in GENERATED["reference/ops.md"]


def test_links_lead_to_pages() -> None:
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:\s]+)[)#]", text):
            path = (Path(name).parent / target).as_posix()
            assert path in PAGES or (ROOT / "docs" / path).exists(), f"{name}: {target}"
            assert ".." not in path, f"{name}: {target} is no page of the site"


def test_anchors_are_headings() -> None:
    for name, text in PAGES.items():
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([\w-]+)\)", text):
            page = PAGES[(Path(name).parent / target).as_posix() if target else name]
            headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name}: {target}#{anchor}"


def test_the_menu_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/name:", "")
    listed = set(re.findall(r"[\w/]+\.md", str(yaml.safe_load(text)["nav"])))
    assert listed == set(PAGES)


@pytest.mark.parametrize("name", [name for name, text in WRITTEN.items() if "```python" in text])
def test_python_of_the_pages_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shared: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", WRITTEN[name], re.DOTALL):
        exec(compile(block, name, "exec", dont_inherit=True), shared)


def test_nothing_of_a_page_is_drawn_by_a_program_from_elsewhere() -> None:
    assert "```mermaid" in WRITTEN["architecture.md"]
    for name, text in PAGES.items():
        assert "```mermaid" not in text, name
    assert site_pages.ARROWS in WRITTEN["architecture.md"]
    assert site_pages.ARROWS not in PAGES["architecture.md"]
    for room in floors.FLOOR:
        assert room == "package" or f"<b>{room}</b>" in PAGES["architecture.md"]


def test_the_pictures_are_those_that_are_drawn() -> None:
    for name, draw in pictures.PICTURES.items():
        assert (ROOT / "docs" / "images" / name).read_text() == draw()
