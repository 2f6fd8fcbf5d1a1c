"""A table from hand-made results, to the digit: Markdown, CSV, JSON, pictures; what is missing stays missing."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from reproduce_cases import fake_evaluation, fake_training, natural, runs_of

from mwpb_fast.config import recipe, to_dict
from mwpb_fast.evaluation.score import statistics
from mwpb_fast.reproduce import render
from mwpb_fast.reproduce.gather import gather
from mwpb_fast.reproduce.report import publish
from mwpb_fast.reproduce.tables import find_table


def test_statistics_by_hand() -> None:
    assert statistics([80.0, 82.0, 84.0]) == {"n": 3, "mean": 82.0, "std": 2.0}
    assert statistics([1.0]) == {"n": 1, "mean": 1.0, "std": None}
    assert statistics([]) == {"n": 0, "mean": None, "std": None}


@pytest.fixture
def three_rows(tmp_path: Path) -> list[Any]:
    """Natural accuracies whose means and deviations can be worked out by hand."""
    runs = runs_of("table1", tmp_path, "at,control_at,mwpb_at")
    values = {"at": (80.0, 82.0, 84.0), "control_at": (70.0, 71.0, 75.0), "mwpb_at": (73.0, 73.0, 79.0)}
    for run in runs:
        natural(run, best=values[run.row.name][run.config.seed])
    return runs


def test_table_by_hand(three_rows: list[Any]) -> None:
    text = render.markdown(gather(find_table("table1"), three_rows))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    radii = "| 0.0200 ± 0.0000 | 0.0550 ± 0.0000 |"
    none = "| - | - | - "
    assert lines == [
        "| row |  | natural | PGD-20 | CW | AA | smallest radius (A.3) | largest radius (A.3) |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        "| AT | paper | 84.10 | 52.72 | 51.80 | 47.95 | - | - |",
        f"|  | ours, best | 82.00 ± 2.00 {none}{radii}",
        f"|  | ours - paper | -2.10 {none}| - | - |",
        f"| AT, two-phase control | ours, best | 72.00 ± 2.65 {none}{radii}",  # sqrt((4 + 1 + 9) / 2)
        "| MWPB-AT | paper | 83.78 | 56.25 | 53.02 | 49.96 | 0.0180 | 0.0550 |",
        f"|  | ours, best | 75.00 ± 3.46 {none}{radii}",  # sqrt((4 + 4 + 16) / 2)
        f"|  | ours - paper | -8.78 {none}| +0.0020 | +0.0000 |",
        f"|  | ours - control, best | +3.00 ± 1.00 {none}| +0.0000 ± 0.0000 | +0.0000 ± 0.0000 |",  # 3, 2, 4
    ]
    assert "0 of 9 runs are complete." in text
    assert "- table1.at seed 0: trained, to be evaluated: best, last" in text


def test_partial_table(three_rows: list[Any]) -> None:
    last = next(run for run in three_rows if (run.row.name, run.config.seed) == ("mwpb_at", 2))
    (last.folder / "results.json").unlink()
    text = render.markdown(gather(find_table("table1"), three_rows))
    assert "|  | ours, best | 73.00 ± 0.00 (2 of 3) | - |" in text
    assert "|  | ours - control, best | +2.50 ± 0.71 (2 of 3) | - |" in text
    (last.folder.with_name("seed1") / "results.json").unlink()
    text = render.markdown(gather(find_table("table1"), three_rows))
    assert "|  | ours, best | 73.00 (1 of 3) | - |" in text


def test_a_damaged_or_foreign_result_is_missing_not_guessed(three_rows: list[Any]) -> None:
    at = [run for run in three_rows if run.row.name == "at"]
    (at[0].folder / "results.json").write_text('{"best": ')
    (at[1].folder / "config.yaml").write_text(yaml.safe_dump(to_dict(recipe("table2.at"))))
    result = gather(find_table("table1"), three_rows)
    assert result["rows"][0]["cells"]["natural"]["best"]["values"] == {"2": 84.0}
    assert "holds a run with other settings" in render.markdown(result)


def test_results_of_another_subset_do_not_count(tmp_path: Path) -> None:
    (run,) = runs_of("table1", tmp_path, "at", seeds=1, overrides=("--evaluation.subset=100",))
    natural(run, best=80.0)
    (full,) = runs_of("table1", tmp_path, "at", seeds=1)
    assert full.folder == run.folder
    table = find_table("table1")
    assert gather(table, [run])["rows"][0]["cells"]["natural"]["best"]["mean"] == 80.0
    assert gather(table, [full])["rows"][0]["cells"]["natural"]["best"]["mean"] is None


def test_both_checkpoints_are_shown(tmp_path: Path) -> None:
    runs = runs_of("table1", tmp_path, "control_at,mwpb_at", seeds=1)
    natural(runs[0], best=80.0, last=81.0)
    natural(runs[1], best=82.0, last=84.5)
    text = render.markdown(gather(find_table("table1"), runs))
    assert "|  | ours, last | 84.50 | - |" in text
    assert "|  | ours - control, last | +3.50 | - |" in text
    assert "One seed (0), which says nothing of others; differences" in text
    assert "deviation" not in text


def test_csv_and_json(three_rows: list[Any], tmp_path: Path) -> None:
    table = find_table("table1")
    result, written, _ = publish(table, three_rows, tmp_path / "out", {"table1.at seed 1": "lost"}, pictures=False)
    assert [path.name for path in written] == ["table.json", "table.md", "table.csv"]
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(result))
    assert "- table1.at seed 1: failed: lost" in written[1].read_text()
    rows = list(csv.DictReader(io.StringIO(written[2].read_text())))
    assert len(rows) == 3 * 6 * 2
    (row,) = [r for r in rows if (r["row"], r["column"], r["checkpoint"]) == ("mwpb_at", "natural", "best")]
    assert (row["table"], row["control"], row["seeds"], row["values"]) == (
        "table1", "control_at", "3", "73.0 73.0 79.0",
    )  # fmt: skip
    numbers = {key: float(row[key]) for key in ("paper", "mean", "std", "difference", "control_difference")}
    assert numbers == pytest.approx(
        {"paper": 83.78, "mean": 75, "std": math.sqrt(12), "difference": -8.78, "control_difference": 3}
    )
    assert [r["mean"] for r in rows if r["column"] == "AA"] == [""] * 6
    assert str(tmp_path) not in written[0].read_text()


def test_radii_of_the_log_are_those_of_the_checkpoints_epoch(tmp_path: Path) -> None:
    (run,) = runs_of("table6", tmp_path, "mwpb_at", seeds=1)
    fake_training(run, [0.02], best=43)
    cell = gather(find_table("table6"), [run])["rows"][0]["cells"]["radius"]
    assert (cell["best"]["mean"], cell["last"]["mean"], cell["paper"]) == (0.043, 0.110, 0.043)
    assert cell["best"]["difference"] == 0


def test_attacks_besides_the_tables_are_columns_without_the_papers_number(tmp_path: Path) -> None:
    (run,) = runs_of("table1", tmp_path, "at", seeds=1, overrides=("--evaluation.attacks=[natural,pgd100]",))
    fake_training(run, [8 / 255])
    fake_evaluation(run, "best", {"natural": 80.0, "pgd100": 40.0})
    text = render.markdown(gather(find_table("table1"), [run]))
    assert "| largest radius (A.3) | pgd100 |" in text
    assert "ours, best | 80.00 | - | - | - | 0.0314 | 0.0314 | 40.00 |" in text


def test_warnings_of_autoattack_are_told(tmp_path: Path) -> None:
    (run,) = runs_of("table1", tmp_path, "at", seeds=1)
    natural(run, best=80.0)
    results = json.loads((run.folder / "results.json").read_text())
    next(iter(results["best"].values()))["warnings"] = {"zero_gradients": {"message": "gradients vanish"}}
    (run.folder / "results.json").write_text(json.dumps(results))
    text = render.markdown(gather(find_table("table1"), [run]))
    assert "- table1.at seed 0, best, natural: warning (zero_gradients): gradients vanish" in text


# pictures -----------------------------------------------------------------------------------------------------
def width_of_png(path: Path) -> int:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int(struct.unpack(">I", content[16:20])[0])


def test_pictures_of_table_1(three_rows: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, written, reason = publish(find_table("table1"), three_rows, tmp_path / "out")
    assert reason == ""
    assert [path.name for path in written[3:]] == ["table.png", "figure2.png"]
    assert all(width_of_png(path) > 800 for path in written[3:])


@pytest.mark.parametrize(("name", "attacks"), [("table7", ("natural", "pgd20")), ("table8", ("natural", "aa"))])
def test_curves(tmp_path: Path, name: str, attacks: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    from mwpb_fast.reproduce import figures

    runs = runs_of(name, tmp_path, seeds=1)
    for number, run in enumerate(runs):
        fake_training(run, [8 / 255])
        fake_evaluation(run, "best", dict.fromkeys(attacks, 50.0 + number))
    result, written, _ = publish(find_table(name), runs, tmp_path / "out")
    assert [path.name for path in written[3:]] == ["table.png", "curves.png"]
    figure = (figures.curves_over_columns if result["columns"][0]["x"] == 0 else figures.curves_over_rows)(result)
    (axis,) = figure.axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    if result["columns"][0]["x"] == 0:
        assert ([0, 8], [50.0, 50.0]) in drawn  # the first row, ours
        assert ([0, 6, 8, 10, 12], [86.21, 64.49, 56.12, 49.58, 45.29]) in drawn  # and the paper's
    else:
        alphas = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.58, 0.7, 0.85, 1.2]
        assert (alphas, [50.0 + n for n in range(10)]) in drawn
        assert (alphas[1:], [51.67, 51.88, 52.58, 52.85, 53.64, 54.16, 54.14, 54.02, 53.50]) in drawn


def test_no_number_no_picture(tmp_path: Path) -> None:
    _, written, _ = publish(find_table("table3"), runs_of("table3", tmp_path), tmp_path / "out")
    assert [path.name for path in written] == ["table.json", "table.md", "table.csv"]


def test_the_committed_experiment_is_rendered_from_its_numbers() -> None:
    folder = Path(__file__).resolve().parents[1] / "bench" / "results" / "small"
    result = json.loads((folder / "table.json").read_text())
    assert render.markdown(result) == (folder / "table.md").read_text()
    assert all(run["state"] == "done" for row in result["rows"] for run in row["runs"])
    assert result["seeds"] == [0, 1, 2]
