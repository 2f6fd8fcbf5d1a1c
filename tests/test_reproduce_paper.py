"""The paper's tables as they are kept: values, shapes and sums, and the recipes of their rows."""

from __future__ import annotations

import dataclasses

import pytest

from mwpb_fast.config import all_recipes, recipe
from mwpb_fast.reproduce import paper
from mwpb_fast.reproduce.tables import TABLES, find_table

PAPER = [f"table{n}" for n in range(1, 9)]


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("table1", "at", "natural", 84.10),
        ("table1", "mwpb_mart", "cw", 52.57),
        ("table1", "mwpb_trades", "aa", 50.73),
        ("table2", "mwpb_at", "natural", 86.82),
        ("table2", "trades", "aa", 53.06),
        ("table3", "mart", "aa", 43.60),
        ("table3", "mwpb_at", "pgd", 61.81),
        ("table4", "trades", "cw", 17.79),
        ("table4", "mwpb_mart", "pgd", 27.15),
        ("table5", "mwpb_at", "natural", 86.85),
        ("table5", "gairat", "aa", 42.29),
        ("table5", "mwpb_awp", "spsa", 64.11),
        ("table6", "mma", "radius", 0.047),
        ("table7", "mwpb_mart", "pgd_10", 55.63),
        ("table7", "trades", "fab", 53.59),
        ("table7", "at", "aa_l2", 58.52),
        ("table8", "alpha_010", "natural", 88.93),
        ("table8", "alpha_120", "aa", 53.50),
    ],
)
def test_spot_values(table: str, row: str, column: str, value: float) -> None:
    assert paper.TABLES[table][row][paper.COLUMNS[table].index(column)] == value
    assert find_table(table).numbers[row][column] == value


def test_shapes() -> None:
    assert {name: len(rows) for name, rows in paper.TABLES.items()} == {
        "table1": 6, "table2": 6, "table3": 6, "table4": 6, "table5": 8, "table6": 4, "table7": 6, "table8": 9,
    }  # fmt: skip
    for name, rows in paper.TABLES.items():
        assert all(len(values) == len(paper.COLUMNS[name]) for values in rows.values()), name


def test_sums() -> None:
    """Added up from the paper's tables by another way than through paper.py: a slip in any digit shows."""
    assert {name: round(sum(map(sum, rows.values())), 4) for name, rows in paper.TABLES.items()} == {
        "table1": 1431.90,
        "table2": 1516.72,
        "table3": 1513.43,
        "table4": 683.89,
        "table5": 2479.48,
        "table6": 0.166,
        "table7": 2409.30,
        "table8": 1785.63,
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_a_recipe_and_every_number_a_cell(name: str) -> None:
    table = TABLES[name]
    rows = {row.name for row in table.rows}
    assert {f"{name}.{row}" for row in rows} <= set(all_recipes())
    if name in PAPER:
        assert {f"{name}.{row}" for row in rows} == {r for r in all_recipes() if r.startswith(f"{name}.")}
        assert set(paper.COLUMNS[name]) <= {column.key for column in table.columns}
    assert set(table.numbers) <= rows
    for row in table.rows:
        assert row.control == "" or row.control in rows
        assert set(table.numbers.get(row.name, {})) <= {column.key for column in table.columns}
        attacks = recipe(f"{name}.{row.name}").evaluation.attacks
        assert {column.attack for column in table.columns if column.source == "attack"} == set(attacks)


def test_every_table_of_the_paper_is_there() -> None:
    assert set(paper.TABLES) == set(PAPER) < set(TABLES)


def test_rows_of_the_paper_without_control_are_those_without_alpha() -> None:
    for name in PAPER:
        for row in TABLES[name].rows:
            mine = recipe(f"{name}.{row.name}")
            if row.control:
                theirs = recipe(f"{name}.{row.control}")
                assert mine.budget.alpha > 0
                assert dataclasses.replace(mine, budget=theirs.budget, recipe="") == dataclasses.replace(
                    theirs, recipe=""
                )
                assert theirs.budget == dataclasses.replace(mine.budget, alpha=0.0)
