"""Tables as text, for a terminal and in Markdown: rows of cells in, lines out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines for a terminal, columns aligned: the first one to the left, the others to the right."""
    widths = _widths(header, rows)
    for row in (header, ["-" * w for w in widths], *rows):
        cells = zip(row, widths, strict=True)
        yield "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(cells))


def markdown(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = (), padded: bool = False
) -> Iterator[str]:
    """Lines of Markdown. right: the columns whose cells stand to the right. padded: with columns aligned, for what
    is read as it is."""
    widths = _widths(header, rows) if padded else [0] * len(header)
    for number, row in enumerate((header, *rows)):
        yield f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |"
        if number == 0:
            rule = ("-" * (max(w, 1) + 1) + (":" if i in right else "-") for i, w in enumerate(widths))
            yield f"|{'|'.join(rule)}|"


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
