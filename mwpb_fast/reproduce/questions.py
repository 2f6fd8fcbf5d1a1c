"""Tables that are not in the paper: what its authors released, and what in it does the work."""

from __future__ import annotations

from mwpb_fast.reproduce.layout import LOGGED, Row, Table, attacked

INTERVALS = (
    "Intervals are Student's, 95 %, of the differences seed by seed. With three seeds they reach 2.5 standard "
    "deviations to either side."
)


def released() -> Table:
    def rows(end: str, label: str) -> tuple[Row, ...]:
        control = f"control_at{end}"
        return (
            Row(name=f"at{end}", label=f"AT{label}"),
            Row(name=control, label=f"AT{label}, two-phase control"),
            Row(name=f"mwpb_at{end}", label=f"MWPB-AT{label}", control=control),
            Row(name=f"sdwpb_at{end}", label=f"SDWPB-AT{label}", control=control),
        )

    note = (
        "As the authors' code has it, not as the paper: eps 0.031, alpha 0.52, 120 epochs, a natural pass, "
        "gradients clipped to norm 1. PGD-20 and CW with step 0.003."
    )
    return Table(
        name="released",
        title="CIFAR-10, the settings of the released code",
        rows=(*rows("", ""), *rows("_resnet18", ", ResNet-18")),
        columns=(*attacked(20), *LOGGED),
        notes=(note, "Their code covers WRN-34-10; the paper's row of it is Table 2's MWPB-AT.", INTERVALS),
        compared=True,
    )


def ablation() -> Table:
    natural, clipped = "with a natural pass", "with clipped gradients"
    rows = (
        Row(name="at", label="AT"),
        Row(name="control", label="two-phase control", control="at"),
        Row(name="mwpb", label="MWPB-AT", control="control"),
        Row(name="at_natural", label=f"AT {natural}", control="at"),
        Row(name="control_natural", label=f"control {natural}", control="control"),
        Row(name="mwpb_natural", label=f"MWPB-AT {natural}", control="control_natural"),
        Row(name="at_clipped", label=f"AT {clipped}", control="at"),
        Row(name="control_clipped", label=f"control {clipped}", control="control"),
        Row(name="mwpb_clipped", label=f"MWPB-AT {clipped}", control="control_clipped"),
        Row(name="mwpb_from_1", label="MWPB-AT from epoch 1", control="at"),
        Row(name="rescaled", label="MWPB-AT, mean radius kept at 8/255", control="control"),
        Row(name="equal", label="MWPB-AT's mean radius for all", control="control"),
        Row(name="fixed_mean", label="control at 0.043", control="control"),
        Row(name="reverse", label="reversed margins", control="control"),
        Row(name="reverse_rescaled", label="reversed margins, mean radius kept", control="control"),
    )
    note = (
        "Each row is compared with the one that differs from it in one thing: MWPB rows with the control under "
        "the same switch, rows with a switch and no margin with the row without it, MWPB from epoch 1 with AT."
    )
    title = "what in MWPB does the work? CIFAR-10, ResNet-18"
    columns = (*attacked(20), *LOGGED)
    return Table(name="ablation", title=title, rows=rows, columns=columns, notes=(note, INTERVALS), compared=True)


def fair() -> Table:
    return _fair("fair", "Four classes of CIFAR-10, small ResNet", "8/255", "a small ResNet on four classes")


def fair_digits() -> Table:
    return _fair(
        "fair_digits", "8x8 digits, small ResNet", "32/255", "8x8 digits, whose radii are four times CIFAR-10's"
    )


def _fair(name: str, where: str, eps: str, what: str) -> Table:
    rows = (
        Row(name="at", label="AT", control="control"),
        Row(name="control", label="two-phase control"),
        Row(name="mwpb", label="MWPB-AT", control="control"),
        Row(name="equal", label="MWPB-AT's mean radius for all", control="control"),
        Row(name="rescaled", label=f"MWPB-AT, mean radius kept at {eps}", control="control"),
    )
    note = (
        f"Not a table of the paper: {what}. MWPB-AT beside the control says what margins and larger radii do "
        "together; the mean radius for all, what the larger radii do; the mean radius kept, what the margins do."
    )
    title = f"is it the margin, or just a larger ball? {where}"
    columns = (*attacked(20)[:3], *LOGGED)
    return Table(name=name, title=title, rows=rows, columns=columns, notes=(note, INTERVALS), compared=True)
