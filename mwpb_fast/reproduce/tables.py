"""The tables: those of the paper, a small one for a CPU, and those that ask what in MWPB does the work."""

from __future__ import annotations

from mwpb_fast.config import ConfigError
from mwpb_fast.meant import meant
from mwpb_fast.reproduce import paper, questions
from mwpb_fast.reproduce.layout import CONTROL, LOGGED, Column, Row, Table, attacked


def find_table(name: str) -> Table:
    """Raises ConfigError, naming the tables, where there is none of that name."""
    if name not in TABLES:
        raise ConfigError(f"no table {name!r}{meant(name, TABLES)}")
    return TABLES[name]


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


def _table1() -> Table:
    table = _table("table1", "CIFAR-10, ResNet-18", FIGURES, (*attacked(20), *A3), notes=(CONTROL,))
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
    return _table("table5", "CIFAR-10, WRN-34-10, other methods", rows, (*attacked(20), SPSA), notes=notes)


def _table6() -> Table:
    rows = (
        Row(name="control_at", label="AT, two-phase control"),
        Row(name="mwpb_at", label="MWPB-AT", control="control_at"),
        Row(name="mwpb_trades", label="MWPB-TRADES"),
        Row(name="mwpb_mart", label="MWPB-MART"),
        Row(name="mma", label="MMA"),
    )
    columns = (*LOGGED, *attacked(20)[:2])
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
    natural, pgd, _, aa = attacked(20)
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
        columns=attacked(20),
        last="cheap",
        test_subset=1000,
        long_subset=500,
        notes=(note,),
    )


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        _table1(),
        _table("table2", "CIFAR-10, WRN-34-10", BASES, attacked(20), notes=(CONTROL,)),
        _table("table3", "SVHN, ResNet-18", BASES, attacked(100), notes=(CONTROL,)),
        _table("table4", "Tiny-ImageNet, ResNet-18", BASES, attacked(100), notes=(CONTROL,)),
        _table5(),
        _table6(),
        _table7(),
        _table8(),
        _small(),
        questions.released(),
        questions.ablation(),
        questions.fair(),
        questions.fair_digits(),
    )
}
