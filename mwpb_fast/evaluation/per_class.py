"""What a result says of each class: its accuracies, and what it is taken for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mwpb_fast.system import text_tables
from mwpb_fast.system.lazy import torch

LARGEST_TABLE = 20  # classes: a wider confusion table fits no terminal
MISTAKES = 20


def by_class(flags: str, labels: torch.Tensor, classes: int) -> list[float | None]:
    """The accuracy of each class in percent, None where it has no image. labels: (n,) int64, of the flags."""
    right = torch.tensor([flag == "1" for flag in flags])
    of_class = torch.bincount(labels, minlength=classes).tolist()
    correct = torch.bincount(labels[right], minlength=classes).tolist()
    return [100 * ok / n if n else None for ok, n in zip(correct, of_class, strict=True)]


def confusion(predicted: Sequence[int], labels: torch.Tensor, classes: int) -> list[list[int]]:
    """Counts of images by class (row) and predicted class (column); those without a prediction, -1, in none."""
    found = torch.tensor(predicted)
    pairs = (labels * classes + found)[found >= 0]
    table: list[list[int]] = torch.bincount(pairs, minlength=classes * classes).view(classes, classes).tolist()
    return table


def format_classes(result: dict[str, Any]) -> str:
    """Of a result of `evaluate`, as text: the accuracy of each class under each attack and in the worst case, then
    for each attack the confusion table; of many classes its largest entries, with the same numbers."""
    names, entries = result["classes"], dict(result["attacks"])
    entries |= {"worst": result["worst"]} if "worst" in result else {}
    columns = [entry["per_class"] for entry in entries.values()]
    rows = [
        [name, *("" if accuracy is None else f"{accuracy:.2f} %" for accuracy in accuracies)]
        for name, *accuracies in zip(names, *columns, strict=True)
    ]
    lines = list(text_tables.plain(["class", *entries], rows))
    for attack, entry in result["attacks"].items():
        if entry.get("confusion"):
            lines += ["", *_confusion_lines(attack, entry["confusion"], names)]
        elif "confusion" in entry:
            lines += ["", f"{attack}: no confusion table, since shards of an earlier version kept no predictions"]
    return "\n".join(lines)


def _confusion_lines(attack: str, table: list[list[int]], names: Sequence[str]) -> list[str]:
    if len(names) <= LARGEST_TABLE:
        rows = [[name, *map(str, row)] for name, row in zip(names, table, strict=True)]
        what = f"{attack}: images by class (rows) and predicted class (columns)"
        return [what, *text_tables.plain(["", *names], rows)]
    mistakes = sorted(
        ((n, i, j) for i, row in enumerate(table) for j, n in enumerate(row) if n and i != j),
        key=lambda found: (-found[0], *found[1:]),
    )
    rows = [[names[i], names[j], str(n)] for n, i, j in mistakes[:MISTAKES]]
    return [f"{attack}: the most frequent mistakes", *text_tables.plain(["class", "predicted", "images"], rows)]
