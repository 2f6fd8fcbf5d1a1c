"""The tables of the documentation come from result files, and say where those were measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "tables.py"
RESULT = {
    "device": "a processor",
    "versions": "torch 9",
    "date": "2030-01-02",
    "commit": "0123456789ab",
    "command": "python bench/some.py",
    "columns": [
        ["op", "op", ""],
        ["case", "case", ""],
        ["ratio", "times faster", ".1f"],
        ["share", "share", ".0%"],
    ],
    "rows": [
        {"op": "a", "case": "large", "ratio": 2.345, "share": 0.876},
        {"op": "b", "case": "small", "ratio": 1.0, "share": 0.5},
        {"op": "c|d", "case": "large", "ratio": None, "share": 1.0},
    ],
}
EXPECTED = """before
<!-- table: some case=large -->
| op | times faster | share |
|---|--:|--:|
| a | 2.3 | 88% |
| c\\|d | - | 100% |

a processor; torch 9; 2030-01-02; commit 0123456789ab; `python bench/some.py`.
<!-- end -->
after
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "some.json").write_text(json.dumps(RESULT))
    path = tmp_path / "performance.md"
    path.write_text("before\n<!-- table: some case=large -->\nold figures\n<!-- end -->\nafter\n")
    return path


def tables(document: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(SCRIPT),
        "--document",
        str(document),
        "--results",
        str(document.parent),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_tables_are_made_from_the_result_file(document: Path) -> None:
    before = document.read_text()
    check = tables(document, "--check")
    assert check.returncode == 1
    assert "out of date" in check.stderr
    assert document.read_text() == before
    assert tables(document).returncode == 0
    assert document.read_text() == EXPECTED
    assert tables(document, "--check").returncode == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("some", "absent", "absent.json"), ("case=large", "case=huge", "no row has {'case': 'huge'}")],
)
def test_a_table_without_results_is_an_error(document: Path, old: str, new: str, message: str) -> None:
    document.write_text(document.read_text().replace(old, new))
    done = tables(document)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_rows_alone(document: Path) -> None:
    document.write_text("<!-- table: some first=1 case=large -->\n<!-- end -->\n")
    assert tables(document).returncode == 0
    assert [line for line in document.read_text().splitlines() if line.startswith("| ")] == [
        "| op | times faster | share |",
        "| a | 2.3 | 88% |",
    ]


def test_these_columns_alone_in_this_order(document: Path) -> None:
    document.write_text("<!-- table: some columns=share,op case=large -->\n<!-- end -->\n")
    assert tables(document).returncode == 0
    assert "| share | op |" in document.read_text().splitlines()
    document.write_text("<!-- table: some columns=op,absent case=large -->\n<!-- end -->\n")
    assert "absent" in tables(document).stderr


def test_an_excerpt_says_nothing_of_what_it_leaves_out_anyway(document: Path) -> None:
    results = document.parent / "some.json"
    results.write_text(json.dumps({**json.loads(results.read_bytes()), "unfinished": ["c"]}))
    for first, said in ((1, False), (9, True)):
        document.write_text(f"<!-- table: some first={first} -->\n<!-- end -->\n")
        assert tables(document).returncode == 0
        assert ("Incomplete (without c)" in document.read_text()) == said


def test_a_text_is_included_without_its_title(document: Path) -> None:
    (document.parent / "small.md").write_text("# title\n\n| a |\n|---|\n\nsaid\n")
    document.write_text("before\n<!-- text: small -->\nold\n<!-- end -->\nafter\n")
    assert tables(document, "--check").returncode == 1
    assert tables(document).returncode == 0
    assert document.read_text() == ("before\n<!-- text: small -->\n| a |\n|---|\n\nsaid\n<!-- end -->\nafter\n")
    document.write_text("<!-- text: absent -->\n<!-- end -->\n")
    assert "absent.md" in tables(document).stderr


def test_an_optional_table_may_lack_its_file(document: Path) -> None:
    document.write_text("<!-- table: absent optional case=large -->\nold\n<!-- end -->\n")
    assert tables(document).returncode == 0
    assert document.read_text() == (
        "<!-- table: absent optional case=large -->\nNot yet measured.\n<!-- end -->\n"
    )
    document.write_text("<!-- table: some optional case=large -->\nold\n<!-- end -->\n")
    assert tables(document).returncode == 0
    assert "| a | 2.3 | 88% |" in document.read_text()


def test_a_file_that_is_incomplete_gives_its_rows_and_says_so(document: Path) -> None:
    (document.parent / "some.json").write_text(
        json.dumps({**RESULT, "failed": "cut off", "unfinished": ["e", "f"]})
    )
    assert tables(document).returncode == 0
    assert "| a | 2.3 | 88% |" in document.read_text()
    assert "\nIncomplete (cut off; without e, f). a processor; torch 9;" in document.read_text()
    rows = {"columns": [["failed", "failed", ""]], "rows": [{"failed": "cut off"}], "failed": "cut off"}
    (document.parent / "some.json").write_text(json.dumps({**RESULT, **rows}))
    assert tables(document).returncode == 0
    assert "-->\nNot measured: cut off.\n<!--" in document.read_text()


def test_columns_may_differ_by_kind(document: Path) -> None:
    kinds = {"one": [["x", "first", "d"]], "two": [["y", "second", ""]]}
    rows = [{"kind": "one", "x": 3}, {"kind": "two", "y": True}]
    (document.parent / "kinds.json").write_text(json.dumps({**RESULT, "columns": kinds, "rows": rows}))
    document.write_text("<!-- table: kinds kind=two -->\nold\n<!-- end -->\n")
    assert tables(document).returncode == 0
    assert "| second |\n|---|\n| yes |\n" in document.read_text()


@pytest.fixture
def repository(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tables' module in a repository of one commit; `at` is that."""
    for name in ("mwpb_fast/engine", "mwpb_fast/data", "kernels"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("1\n", encoding="utf-8")
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "a")):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True)
    tables = bench("tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.changed.cache_clear()
    yield tables, head.stdout.strip()[:12]
    tables.changed.cache_clear()


@pytest.mark.parametrize(
    ("script", "of_it"),
    [
        ("attack", {"mwpb_fast/engine", "kernels"}),
        ("train", {"mwpb_fast/engine", "kernels"}),
        ("kernels", {"kernels"}),
        ("loaders", {"mwpb_fast/data"}),
    ],
)
def test_figures_older_than_what_they_are_of_are_marked(repository: Any, script: str, of_it: set[str]) -> None:
    tables, head = repository
    content = {**RESULT, "commit": f"{head} with changes", "command": f"python bench/{script}.py --rounds 3"}
    told = f"commit {head} with changes; `python bench/{script}.py --rounds 3`"
    assert tables.table(content, {}, tables.OLDER).endswith(f"{told}.")
    for name in ("mwpb_fast/engine", "mwpb_fast/data", "kernels"):
        path = tables.ROOT / name / "a.py"
        path.write_text("2\n", encoding="utf-8")
        tables.changed.cache_clear()
        marked = f"{told}; older than the code, which has changed since that commit." in tables.table(
            content, {}, ""
        )
        assert marked == (name in of_it)
        path.write_text("1\n", encoding="utf-8")


def test_a_mark_stays_where_git_cannot_tell(repository: Any) -> None:
    """In a copy without the commit, or where there is no git."""
    tables, _ = repository
    for before in ("", f"a table; {tables.OLDER}"):
        assert tables.older(RESULT, before) == (before != "")
    tables.ROOT = tables.ROOT / "absent"
    assert not tables.older({**RESULT, "commit": "HEAD"}, "")


def test_what_is_measured_what_is_modelled_and_what_is_neither(repository: Any, tmp_path: Path) -> None:
    tables, head = repository
    document = "<!-- standing -->\nold\n<!-- end -->\nafter"
    bare = tables.rendered(document, tmp_path).splitlines()
    figures = tables.standing.FIGURES
    assert len(bare) == 2 + len(figures) + 3
    assert not [line for line in bare if "measured" in line and "modelled, never measured" not in line]
    assert "| fused ops | CPU | neither | - |" in bare
    (tmp_path / "kernels-cpu.json").write_text(json.dumps({**RESULT, "commit": head}), encoding="utf-8")
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "loaders.json").write_text(json.dumps({**RESULT, "rows": []}), encoding="utf-8")
    (tmp_path / "gpu" / "train.json").write_text(json.dumps({**RESULT, "failed": "cut off"}), encoding="utf-8")
    text = tables.rendered(document, tmp_path)
    assert "| fused ops | CPU | measured, 2030-01-02 | kernels-cpu.json |" in text
    assert "| loaders | GPU | neither | - |" in text
    assert "by_hand, captured | GPU | measured, in part, 2030-01-02 | gpu/train.json |" in text
    assert text == tables.rendered(text, tmp_path)
    old = text.replace(
        "2030-01-02 | gpu/train", "2030-01-02; older than the code | gpu/train"
    )  # an unknown commit
    assert tables.rendered(old, tmp_path) == old


def test_every_figure_that_has_a_table_has_a_standing(bench: Any) -> None:
    text = (SCRIPT.parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"<!-- table: (\S+)", text)) - {"gpu/summary", "gpu/tests", "real-images-cpu"}
    listed = {figure.file for figure in bench("standing").FIGURES}
    assert shown == listed - {"", "gpu/autoattack"}


def test_the_documentation_is_up_to_date() -> None:
    path = SCRIPT.parent.parent / "docs" / "performance.md"
    if not path.exists():
        pytest.skip("no docs/performance.md")
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_where_dali_begins_is_reckoned_from_the_loaders_figures(repository: Any, tmp_path: Path) -> None:
    """Of 80 and 16 GiB that are free the resident loader has half; a step's rate is without what it waited."""
    tables, _ = repository
    of = {
        "set": "b, 224x224",
        "wait_share": 0.0,
        "image_bytes": 150_528,
        "file_bytes": 20_480.0,
        "batch": 32,
        "step_ms": 4e3,
    }
    rates = {"resident": 9e4, "dali, pixels": 2e4, "dali, files": 1e3}
    rows = [
        {"set": "a, 32x32", "loader": "resident", "images_per_second": 1e6, "step_ms": 80.0, "wait_share": 0.2},
        *({**of, "loader": k, "images_per_second": v} for k, v in rates.items()),
    ]
    content = {**RESULT, "batch": 128, "columns": [], "rows": rows}
    (tmp_path / "loaders-cpu.json").write_text(json.dumps(content), encoding="utf-8")
    text = tables.rendered("<!-- crossover: loaders-cpu -->\nold\n<!-- end -->\nafter", tmp_path)
    lines = text.splitlines()
    assert "| a, 32x32 | 3.0 | - | 2,796,202 | 13,981,013 | 1,000,000 | - | 2,000 | - |" in lines
    assert "| b, 224x224 | 147.0 | 20.0 | 57,065 | 285,326 | 90,000 | 1,000 | 8 | 125 |" in lines
    assert lines[-3:] == [tables.measured(content, ""), "<!-- end -->", "after"]
    assert text == tables.rendered(text, tmp_path)
