"""What a table is: its rows, each a recipe of the module of the table's name, and its columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mwpb_fast.config import ConfigError
from mwpb_fast.meant import meant

TWO_PHASE = "two-phase control"  # in the labels of the rows that are one
CONTROL = f"The paper has no {TWO_PHASE}: alpha = 0, the same warm-up and schedule, radius 8/255 after it."


@dataclass(frozen=True, kw_only=True)
class Row:
    """name: of the recipe's function. control: the row that this one is compared with, seed by seed: the same
    recipe but alpha = 0, or what else the table's question is. x: where the row stands on the axis of a curve over
    the rows. figure: number of the paper's figure that shows this row's radii, 0 for none."""

    name: str
    label: str
    control: str = ""
    x: float | None = None
    figure: int = 0


@dataclass(frozen=True, kw_only=True)
class Column:
    """source: what the numbers are. attack: accuracy in percent under the evaluation's attack `attack`. radii:
    the smallest, mean or largest (`attack` says which: min, mean, max) radius of the training images under the
    best checkpoint. log: that of the training log in the checkpoint's epoch. key: of the paper's number. digits:
    after the point. x: where the column stands on the axis of a curve over the columns."""

    key: str
    label: str
    attack: str
    source: Literal["attack", "radii", "log"] = "attack"
    digits: int = 2
    x: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """name: of the module of the rows' recipes. last: whether the last checkpoint is attacked by all the attacks
    or by the cheap ones only. test_subset: test images, 0 for as many as the recipes have. long_subset: the same
    for the long attacks, 0 for as many as for the others.
    axis: what x of rows or columns is. compared: whether what counts are the differences to the control rows,
    which are then shown with their 95 % intervals, and beside them the radii over the epochs. numbers: row ->
    column key -> the paper's number."""

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    axis: str = ""
    last: Literal["all", "cheap"] = "all"
    test_subset: int = 0
    long_subset: int = 0
    notes: tuple[str, ...] = ()
    compared: bool = False
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Raises ConfigError, naming the rows, where there is none of that name."""
        for row in self.rows:
            if row.name == name.replace("-", "_"):
                return row
        rows = [row.name for row in self.rows]
        raise ConfigError(f"{self.name} has no row {name!r}{meant(name, rows, '; it has ', 3)}")


def attacked(steps: int) -> tuple[Column, ...]:
    """The columns of the tables of the paper."""
    heading = "PGD-20" if steps == 20 else f"PGD-{steps} (headed PGD-20)"
    return (
        Column(key="natural", label="natural", attack="natural"),
        Column(key="pgd", label=heading, attack=f"pgd{steps}"),
        Column(key="cw", label="CW", attack="cw20"),
        Column(key="aa", label="AA", attack="aa"),
    )


LOGGED = (
    Column(key="radius", label="mean radius", attack="mean", source="log", digits=4),
    Column(key="radius_min", label="smallest", attack="min", source="log", digits=4),
    Column(key="radius_max", label="largest", attack="max", source="log", digits=4),
)
