"""Of every kind of figure about speed: whether it was measured, was modelled, or is known to nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("figure", "on", "standing", "from")
UNKNOWN = "neither"
EPOCH = "seconds of an epoch, ResNet-18, AT with PGD-10, batch 128, bf16"
# Estimates for an H100 from counted operations and bytes, at the rates of its data sheet and a few microseconds a
# launch. They are there to be proven wrong.
MODELLED = "modelled, never measured: about {} on an H100"


@dataclass(frozen=True)
class Figure:
    """file: in bench/results, without its suffix, that has it once it is measured; "" where a test holds it.
    otherwise: its standing until then. source: what gives it, where that is no result file."""

    what: str
    on: str
    file: str
    otherwise: str = UNKNOWN
    source: str = "-"


FIGURES = (
    Figure("fused ops", "CPU", "kernels-cpu"),
    Figure("attack against other packages, ResNet-18", "CPU", "attack-resnet-18-cpu"),
    Figure("attack against other packages, WRN-34-10", "CPU", "attack-wrn-34-10-cpu"),
    Figure("training step", "CPU", "train-resnet-18-cpu"),
    Figure("what CUDA tries, in the attack", "CPU", "rewrites-attack-cpu"),
    Figure("what CUDA tries, in the training step", "CPU", "rewrites-train-cpu"),
    Figure("layers", "CPU", "roofline-resnet-18-cpu"),
    Figure("loaders", "CPU", "loaders-cpu"),
    Figure("beside other programs", "CPU", "busy-cpu"),
    Figure("what the fast paths change", "CPU", "equivalence-cpu"),
    Figure("AutoAttack's parts against other packages", "CPU", "autoattack-cpu"),
    Figure("AutoAttack's flags against pyautoattack's", "CPU", "verdicts-cpu"),
    Figure("how much sooner AutoAttack's verdict is there", "CPU", "sooner-cpu"),
    Figure(
        "operations and bytes of an attack step", "GPU", "", "counted, on fake tensors", "tests/test_fake_cuda.py"
    ),
    Figure(
        "operations and bytes of a training pass", "GPU", "", "counted, on fake tensors", "tests/test_fake_cuda.py"
    ),
    Figure(
        "registers, spills and vector widths of the Triton kernels",
        "GPU",
        "",
        "read from what is compiled, never run",
        "tests/ops",
    ),
    Figure(f"{EPOCH}: eager", "GPU", "gpu/train", MODELLED.format("6.7 to 7.8")),
    Figure(f"{EPOCH}: twin", "GPU", "gpu/train", MODELLED.format("5.9")),
    Figure(f"{EPOCH}: twin, captured", "GPU", "gpu/train", MODELLED.format("5.6")),
    Figure(f"{EPOCH}: by_hand, captured", "GPU", "gpu/train", MODELLED.format("5.2")),
    Figure(f"{EPOCH}: halves, captured", "GPU", "gpu/train"),
    Figure(f"{EPOCH}: twin, captured, fused training pass", "GPU", "gpu/train"),
    *(
        Figure(f"{EPOCH}: {name}, captured", "GPU", "gpu/train-fused")
        for name in ("one_kernel", "by_hand_stem", "one_kernel_stem")
    ),
    Figure("training step, WRN-34-10", "GPU", "gpu/train-wrn"),
    Figure("attack against other packages", "GPU", "gpu/attack"),
    Figure("fused ops", "GPU", "gpu/kernels"),
    Figure("layers", "GPU", "gpu/roofline"),
    Figure("loaders", "GPU", "gpu/loaders"),
    Figure("what the fast paths change", "GPU", "gpu/equivalence"),
    Figure("AutoAttack's parts against other packages", "GPU", "gpu/autoattack-parts"),
    Figure("the trial at the start of a run, a training, its evaluation", "GPU", "gpu/training"),
    Figure(
        "standard AutoAttack, ResNet-18, 10,000 images, full float32",
        "GPU",
        "gpu/autoattack",
        MODELLED.format("13 minutes at the least"),
    ),
)


def rows(results: Path, past: Callable[[str, dict[str, Any]], str]) -> list[list[str]]:
    """A row for each figure, in the order of COLUMNS. past: what to add where a result file, whose row begins so,
    is older than the code."""
    found = []
    for figure in FIGURES:
        path = results / f"{figure.file}.json"
        standing, source = figure.otherwise, figure.source
        if figure.file and path.exists():
            content = json.loads(path.read_bytes())
            if content.get("rows"):
                part = ", in part" if {"failed", "unfinished"} & set(content) else ""
                old = past(f"| {figure.what} | {figure.on} |", content)
                date = f", {content['date']}" if content.get("date") else ""
                standing, source = f"measured{part}{date}{old}", f"{figure.file}.json"
        found.append([figure.what, figure.on, standing, source])
    return found
