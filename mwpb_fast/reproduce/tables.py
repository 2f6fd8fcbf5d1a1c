"""What a table shows: its rows, each a recipe of the module of the table's name, and its columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mwpb_fast.config import ConfigError
from mwpb_fast.reproduce import paper


@dataclass(frozen=True, kw_only=True)
class Row:
    """name: of the recipe's function. control: the row with the same recipe but alpha = 0, if there is one.
    x: where the row stands on the axis of a curve over the rows. figure: number of the paper's figure that
    shows this row's radii, 0 for none."""

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
    """last: whether the last checkpoint is attacked by all the attacks or by the cheap ones only. long_subset:
    test images for the long attacks, 0 for as many as for the others. axis: what x of rows or columns is.
    numbers: row -> column key -> the paper's number."""

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    axis: str = ""
    last: Literal["all", "cheap"] = "all"
    long_subset: int = 0
    notes: tuple[str, ...] = ()
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Raises ConfigError, naming the rows, where there is none of that name."""
        for row in self.rows:
            if row.name == name.replace("-", "_"):
                return row
        raise ConfigError(f"{self.name} has no row {name!r}; it has {', '.join(row.name for row in self.rows)}")


def find_table(name: str) -> Table:
    """Raises ConfigError, naming the tables, where there is none of that name."""
    if name not in TABLES:
        raise ConfigError(f"no table {name!r}; there are {', '.join(TABLES)}")
    return TABLES[name]


def _columns(steps: int) -> tuple[Column, ...]:
    heading = "PGD-20" if steps == 20 else f"PGD-{steps} (headed PGD-20)"
    return (
        Column(key="natural", label="natural", attack="natural"),
        Column(key="pgd", label=heading, attack=f"pgd{steps}"),
        Column(key="cw", label="CW", attack="cw20"),
        Column(key="aa", label="AA", attack="aa"),
    )


def _method(name: str, label: str, figure: int = 0) -> tuple[Row, ...]:
    return (
        Row(name=name, label=label),
        Row(name=f"control_{name}", label=f"{label}, two-phase control"),
        Row(name=f"mwpb_{name}", label=f"MWPB-{label}", control=f"control_{name}", figure=figure),
    )


def _table(name: str, title: str, rows: tuple[Row, ...], columns: tuple[Column, ...], **more: object) -> Table:
    numbers: dict[str, dict[str, float]] = {}
    for row, values in paper.TABLES.get(name, {}).items():
        numbers[row] = dict(zip(paper.COLUMNS[name], values, strict=True))
    return Table(name=name, title=title, rows=rows, columns=columns, numbers=numbers, **more)  # type: ignore[arg-type]


BASES = (*_method("at", "AT"), *_method("mart", "MART"), *_method("trades", "TRADES"))
FIGURES = (*_method("at", "AT", 2), *_method("mart", "MART", 4), *_method("trades", "TRADES", 3))
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.58, 0.7, 0.85, 1.2)
SPSA = Column(key="spsa", label="SPSA", attack="spsa")
A3 = (
    Column(key="radius_min", label="smallest radius (A.3)", attack="min", source="radii", digits=4),
    Column(key="radius_max", label="largest radius (A.3)", attack="max", source="radii", digits=4),
)
CONTROL = "The paper has no two-phase control: alpha = 0, the same warm-up and schedule, radius 8/255 after it."


def _table1() -> Table:
    table = _table("table1", "CIFAR-10, ResNet-18", FIGURES, (*_columns(20), *A3), notes=(CONTROL,))
    for row, (low, high) in paper.EXTREMES.items():
        table.numbers[row] |= {"radius_min": low, "radius_max": high}
    return table


def _table5() -> Table:
    rows = (
        Row(name="mma", label="MMA"),
        Row(name="wat", label="WAT"),
        Row(name="mail", label="MAIL"),
        Row(name="control_at", label="AT, two-phase control"),
        Row(name="mwpb_at", label="MWPB-AT", control="control_at"),
        Row(name="gairat", label="GAIRAT"),
        Row(name="awp", label="AWP"),
        Row(name="control_awp", label="AWP, two-phase control"),
        Row(name="mwpb_awp", label="MWPB-AWP", control="control_awp"),
        Row(name="st", label="ST-AT"),
        Row(name="iaat", label="IAAT"),
    )
    notes = (CONTROL, "The paper has no numbers of IAAT.")
    return _table("table5", "CIFAR-10, WRN-34-10, other methods", rows, (*_columns(20), SPSA), notes=notes)


def _table6() -> Table:
    rows = (
        Row(name="control_at", label="AT, two-phase control"),
        Row(name="mwpb_at", label="MWPB-AT", control="control_at"),
        Row(name="mwpb_trades", label="MWPB-TRADES"),
        Row(name="mwpb_mart", label="MWPB-MART"),
        Row(name="mma", label="MMA"),
    )
    columns = (
        Column(key="radius", label="mean radius", attack="mean", source="log", digits=4),
        Column(key="radius_min", label="smallest", attack="min", source="log", digits=4),
        Column(key="radius_max", label="largest", attack="max", source="log", digits=4),
        Column(key="natural", label="natural", attack="natural"),
        Column(key="pgd", label="PGD-20", attack="pgd20"),
    )
    notes = ("Radii are those of the training log in the checkpoint's epoch. The paper does not name the model.",)
    return _table("table6", "mean radius in training, CIFAR-10, WRN-34-10", rows, columns, notes=notes)


def _table7() -> Table:
    columns = (
        Column(key="natural", label="natural", attack="natural", x=0),
        Column(key="pgd_6", label="PGD-20, 6/255", attack="pgd20@6/255", x=6),
        Column(key="pgd", label="PGD-20, 8/255", attack="pgd20", x=8),
        Column(key="pgd_10", label="PGD-20, 10/255", attack="pgd20@10/255", x=10),
        Column(key="pgd_12", label="PGD-20, 12/255", attack="pgd20@12/255", x=12),
        Column(key="square", label="Square", attack="square"),
        SPSA,
        Column(key="aa_l2", label="AA, l2 128/255", attack="aa-l2"),
        Column(key="fab", label="FAB", attack="fab"),
    )
    notes = (CONTROL, "The paper's natural and PGD-20 8/255 numbers are those of Table 2: the same models.")
    table = _table(
        "table7",
        "CIFAR-10, WRN-34-10, more attacks",
        BASES,
        columns,
        axis="radius of PGD-20, in 1/255",
        notes=notes,
    )
    for row, values in paper.TABLES["table2"].items():
        table.numbers[row] |= dict(zip(("natural", "pgd"), values[:2], strict=True))
    return table


def _table8() -> Table:
    rows = [
        Row(
            name=f"alpha_{round(100 * alpha):03d}",
            label=f"MWPB-AT, alpha = {alpha:.2f}" if alpha else "AT, two-phase control (alpha = 0)",
            control="alpha_000" if alpha else "",
            x=alpha,
        )
        for alpha in ALPHAS
    ]
    natural, pgd, _, aa = _columns(20)
    title = "MWPB-AT over alpha, CIFAR-10, WRN-34-10"
    return _table("table8", title, tuple(rows), (natural, pgd, aa), axis="alpha", notes=(CONTROL,))


def _small() -> Table:
    note = (
        "Not a table of the paper: a small ResNet on 5,000 training images for a tenth of the epochs. "
        "It compares the recipes with each other; the paper's numbers are out of its reach."
    )
    title = "CIFAR-10, small ResNet, 5,000 training images"
    return Table(
        name="small",
        title=title,
        rows=_method("at", "AT"),
        columns=_columns(20),
        last="cheap",
        long_subset=500,
        notes=(note,),
    )


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        _table1(),
        _table("table2", "CIFAR-10, WRN-34-10", BASES, _columns(20), notes=(CONTROL,)),
        _table("table3", "SVHN, ResNet-18", BASES, _columns(100), notes=(CONTROL,)),
        _table("table4", "Tiny-ImageNet, ResNet-18", BASES, _columns(100), notes=(CONTROL,)),
        _table5(),
        _table6(),
        _table7(),
        _table8(),
        _small(),
    )
}
