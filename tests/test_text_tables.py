"""Tables as text: aligned for a terminal, and in both forms of Markdown."""

from __future__ import annotations

from mwpb_fast.system import text_tables

HEADER, ROWS = ["attack", "accuracy", ""], [["pgd20", "50.25 %", ""], ["aa", "9.00 %", "linf"]]


def test_a_terminals_columns_are_aligned() -> None:
    assert list(text_tables.plain(HEADER, ROWS)) == [
        "attack  accuracy      ",
        "------  --------  ----",
        "pgd20    50.25 %      ",
        "aa        9.00 %  linf",
    ]


def test_markdown_as_it_is_read_by_a_program_and_by_a_person() -> None:
    assert list(text_tables.markdown(HEADER, ROWS, right=[1])) == [
        "| attack | accuracy |  |",
        "|---|--:|---|",
        "| pgd20 | 50.25 % |  |",
        "| aa | 9.00 % | linf |",
    ]
    assert list(text_tables.markdown(HEADER, ROWS, padded=True)) == [
        "| attack | accuracy |      |",
        "|--------|----------|------|",
        "| pgd20  | 50.25 %  |      |",
        "| aa     | 9.00 %   | linf |",
    ]


def test_a_table_without_rows_has_its_header() -> None:
    assert list(text_tables.plain(["op", "cpu"], [])) == ["op  cpu", "--  ---"]
    assert list(text_tables.markdown(["op", "cpu"], [])) == ["| op | cpu |", "|---|---|"]
