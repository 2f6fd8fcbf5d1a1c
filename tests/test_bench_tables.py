"""The tables of the documentation come from result files, and say where those were measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


def test_the_documentation_is_up_to_date() -> None:
    path = SCRIPT.parent.parent / "docs" / "performance.md"
    if not path.exists():
        pytest.skip("no docs/performance.md")
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
