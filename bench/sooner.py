"""How much sooner AutoAttack's verdict is there: pyautoattack's, this project's, and its preview's, in turn.

    python bench/sooner.py runs/a runs/b --images 100 --json bench/results/sooner-cpu.json

The models are those of bench/verdict_models.py, or any runs and checkpoints. All three attack the same images with
the same seeds at each model's own radius: pyautoattack the model as its users have it, `aa` and `aa-fast` as
`mwpb-fast evaluate` runs them, each with nothing kept from an earlier time. A round times each once, so ratios are
between neighbours in time; the result is written after every round. What share of the images a model loses decides
how much a preview can save: one that withstands everything costs as much as before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import command_line, settled, spread
from record import Results, leave_at_sigterm
from rounds import Rounds
from verdicts import Model

REFERENCE, PROGRAMS = "pyautoattack", {"mwpb-fast, aa": "aa", "mwpb-fast, aa-fast": "aa-fast"}
COLUMNS = (
    ("model", "model", ""),
    ("images", "images", "d"),
    ("robust", "right under it, %", ".1f"),
    ("name", "program", ""),
    ("took", "seconds", ".1f"),
    ("times", "times pyautoattack's speed", ".2f"),
    ("low", "least", ".2f"),
    ("high", "most", ".2f"),
    ("differ", "flags that differ", "d"),
)


def timed(model: Model, name: str) -> tuple[float, str]:
    """Its seconds, and the flags."""
    with tempfile.TemporaryDirectory() as kept:
        model.o.kept_in, start = Path(kept), time.perf_counter()
        if name == REFERENCE:
            flags = model.theirs("aa", torch.contiguous_format)
        else:
            flags = model.ours(PROGRAMS[name])["flags"]
        return time.perf_counter() - start, flags


def rows(model: Model, times: dict[str, list[float]], flags: dict[str, str]) -> list[Any]:
    found = []
    for name, taken in times.items():
        against = spread([a / b for a, b in zip(times[REFERENCE], taken, strict=True)])
        mine, theirs = flags[name], flags[REFERENCE]
        row: dict[str, Any] = {"model": model.name, "images": len(mine), "name": name, "seconds": taken}
        row |= {"robust": 100 * mine.count("1") / len(mine), "took": spread(taken)["median"]}
        row |= {"times": against["median"], "low": against["min"], "high": against["max"]}
        found.append(row | {"differ": sum(a != b for a, b in zip(mine, theirs, strict=True))})
    return found


def run(model: Model, results: Results, o: argparse.Namespace, deadline: float) -> None:
    times: dict[str, list[float]] = {name: [] for name in (REFERENCE, *PROGRAMS)}
    flags: dict[str, str] = {}
    rounds = Rounds(o.rounds, deadline, o.device, time.perf_counter)
    for turn in rounds:
        for name, taken in times.items():
            took, flags[name] = timed(model, name)
            taken.append(took)
        results.more["beside"][model.name] = rounds.beside()
        results.put(model.name, rows(model, times, flags), done=turn + 1 == o.rounds)
        print(f"{model.name}: round {turn + 1}/{o.rounds}", *(f"{t[-1]:.1f}" for t in times.values()), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("targets", type=Path, nargs="+", metavar="RUN|FILE")
    parser.add_argument("--images", type=int, default=100, help="of each test set, stratified")
    parser.add_argument("--data-dir", type=Path, help="holds the prepared data sets")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; what will not fit is left")
    o = settled(parser.parse_args(arguments))
    leave_at_sigterm()
    o.attacks = ["aa"]
    models = {model.name: model for model in (Model(target, o.images, o) for target in o.targets)}
    results = Results(o.json, o.device, COLUMNS, models, images_of_each=o.images, beside={})
    end = time.monotonic() + o.budget
    for name in results.fitting(results.unfinished, end):
        run(models[name], results, o, end)


if __name__ == "__main__":
    main()
