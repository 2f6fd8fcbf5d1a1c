"""The targets, and what the result files of a suite say of each."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = (
    ("row", "what", ""),
    ("good", "good", ""),
    ("target", "target", ""),
    ("beyond", "beyond", ""),
    ("measured", "measured", ""),
    ("met", "met", ""),
    ("file", "file", ""),
)
# what moves images and weights and computes little: memory bounds them
ELEMENT_WISE = ("awp_perturb_", "awp_restore_", "crop_flip", "l2_step_", "linf_step_", "scale_bias_relu")
EPOCHS = 110
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """row: what is measured. levels: good, target, beyond. unit: appended to the figures, {} stands for one.
    file: where the figure is. figure: from the file's rows, None where they do not say. at_least: whether more
    is better. on: the kind of device whose target it is."""

    row: str
    levels: tuple[float, float, float]
    unit: str
    file: str
    figure: Callable[[Rows], float | None]
    at_least: bool = False
    on: str = "cuda"

    def shown(self, value: float | None) -> str:
        return "-" if value is None else self.unit.format(value)


def epoch_seconds(recipe: str) -> Callable[[Rows], float | None]:
    """Of the fastest variant of the recipe's step."""

    def figure(rows: Rows) -> float | None:
        return min((r["epoch_seconds"] for r in rows if r["recipe"] == recipe), default=None)

    return figure


def whole_run(rows: Rows) -> float | None:
    seconds = epoch_seconds("table1.mwpb_at")(rows)
    return None if seconds is None else EPOCHS * seconds / 60


def share_of_copy(rows: Rows) -> float | None:
    """Median over the ops that memory bounds; one that fails has none of it."""
    shares = [r["share_of_copy"] or 0.0 for r in rows if r["op"] in ELEMENT_WISE and r["case"] == "large"]
    return statistics.median(shares) if shares else None


def against(*endings: str) -> Callable[[Rows], float | None]:
    """Time of the fastest attack whose name ends so over that of this project's fastest; both as multiples of the
    time that the first contestant took beside them."""

    def figure(rows: Rows) -> float | None:
        ours = [r["slower"] for r in rows if r["name"].startswith("mwpb")]
        theirs = [r["slower"] for r in rows if r["name"].endswith(endings)]
        return min(theirs) / min(ours) if ours and theirs else None

    return figure


def share_of_matrix_rate(rows: Rows) -> float | None:
    return max((r["share"] for r in rows if r["name"].startswith("mwpb twin bf16")), default=None)


TARGETS = (
    Target(
        "RN-18 MWPB-AT, batch 128, seconds per 50k epoch",
        (5.3, 3.7, 3.0),
        "{:.2f}",
        "train",
        epoch_seconds("table1.mwpb_at"),
    ),
    Target(
        "WRN-34-10 MWPB-AT, batch 128, seconds per 50k epoch",
        (50, 35, 28),
        "{:.1f}",
        "train-wrn",
        epoch_seconds("table2.mwpb_at"),
    ),
    Target(
        "110 epochs of Table 1's steps, without validation, minutes", (12, 7, 5.5), "{:.1f}", "train", whole_run
    ),
    Target(
        "fused element-wise ops, large, share of the copy's bandwidth, median",
        (0.8, 0.9, 0.95),
        "{:.0%}",
        "kernels",
        share_of_copy,
        True,
    ),
    Target(
        "fused element-wise ops on the CPU, large, share of the copy's bandwidth, median",
        (0.8, 0.9, 0.95),
        "{:.0%}",
        "kernels",
        share_of_copy,
        True,
        "cpu",
    ),
    Target(
        "standard AutoAttack, RN-18, 10k images, float32, minutes",
        (12, 8, 5),
        "{:.1f}",
        "autoattack",
        lambda r: None,
    ),
    Target(
        "attack, times the speed of the fastest peer as used",
        (2.0, 2.3, 2.5),
        "{:.2f}x",
        "attack",
        against("as used"),
        True,
        "cpu",
    ),
    Target(
        "attack, share of the bf16 matrix rate",
        (0.75, 0.85, 0.9),
        "{:.0%}",
        "attack",
        share_of_matrix_rate,
        True,
        "cpu",
    ),
    Target(
        "attack against a TRADES-style float32 loop",
        (5, 7, 9),
        "{:.2f}x",
        "attack",
        against("TRADES-style, as used"),
        True,
    ),
    Target(
        "attack against that loop with bf16 autocast, channels-last and torch.compile",
        (1.5, 2, 2.5),
        "{:.2f}x",
        "attack",
        against("TRADES-style, autocast channels-last compile"),
        True,
    ),
)


def summary(folder: Path, kind: str) -> Rows:
    """A row for each target on devices of that kind: its three levels, what the folder's files say, and which
    level that reaches. What a file holds of a stage that did not come to its end counts, and is marked."""
    rows: Rows = []
    for target in (t for t in TARGETS if t.on == kind):
        value, part = None, ""
        try:
            content = json.loads((folder / f"{target.file}.json").read_bytes())
            part = " (in part)" if {"failed", "unfinished"} & set(content) else ""
            value = target.figure(content["rows"])
        except (OSError, ValueError, KeyError):
            pass
        met = "not measured"
        if value is not None:
            sign = 1 if target.at_least else -1
            reached = [
                name
                for name, level in zip(("good", "target", "beyond"), target.levels, strict=True)
                if sign * value >= sign * level
            ]
            met = reached[-1] if reached else "missed"
        good, aim, beyond = (target.shown(level) for level in target.levels)
        rows.append(
            {
                "row": target.row,
                "good": good,
                "target": aim,
                "beyond": beyond,
                "measured": target.shown(value) + (part if value is not None else ""),
                "met": met,
                "file": f"{target.file}.json",
                "value": value,
            }
        )
    return rows
