"""Trains a small ResNet on real CIFAR-10 images by every base objective, plain and margin-weighted, for a few
hundred steps on whatever machine this is, and writes the robust accuracy before and after as JSON.

    python bench/real_images.py --data-dir data --json bench/results/real-images-cpu.json

It shows that each method trains; its accuracies say nothing about the paper's.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import write_results

from mwpb_fast import train
from mwpb_fast.config import Config, recipe, resolve
from mwpb_fast.runs.log import read_records
from mwpb_fast.system.signals import StopRequest

RECIPES = [f"small.{form}{base}" for base in ("at", "trades", "mart") for form in ("", "mwpb_")]
BATCH = 64


def configuration(name: str, steps: int, data_dir: str, seed: int) -> Config:
    """The recipe cut to `steps` steps of 64 images: four epochs, half of them warm-up in the two-phase forms."""
    start = recipe(name)
    options = [
        "--epochs=4",
        f"--warmup_epochs={2 if start.warmup_epochs else 0}",
        f"--data.dir={data_dir}",
        f"--data.subset={steps // 4 * BATCH}",
        f"--data.batch_size={BATCH}",
        "--model.name=smallresnet-8",
        "--optim.drops=[4]",
        "--evaluation.validate_every=4",
        f"--seed={seed}",
    ]
    return resolve(start, [], options)


def measure(config: Config, folder: Path) -> dict[str, Any]:
    """Train, and report validation accuracy (natural, PGD-10) at the start and at the end."""
    fresh = train.Trainer(dataclasses.replace(config, epochs=1), folder / "start", StopRequest(), quiet=True)
    before = fresh.validate()
    started = time.monotonic()
    train.run(config, folder / "run", quiet=True)
    seconds = time.monotonic() - started
    records = read_records(folder / "run" / "metrics.jsonl")
    after = {k: records[-1][k] for k in ("natural", "robust")}
    return {
        "recipe": config.recipe,
        "steps": len(records) * (config.data.subset // config.data.batch_size),
        "validation_images": len(fresh.val_index),
        "before": before,
        "after": after,
        "losses": [r["loss"] for r in records],
        "radius": [records[-1][f"radius_{k}"] for k in ("min", "mean", "max")],
        "seconds": seconds,
    }


COLUMNS = (
    ("recipe", "recipe", ""),
    ("steps", "steps of 64 images", "d"),
    ("natural_before", "natural before, %", ".1f"),
    ("natural_after", "natural after, %", ".1f"),
    ("robust_before", "PGD-10 before, %", ".1f"),
    ("robust_after", "PGD-10 after, %", ".1f"),
    ("radius_mean", "mean radius in the last epoch", ".4f"),
)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the result file: plain columns first, the rest beside them."""
    named = {f"{k}_{when}": row[when][k] for k in ("natural", "robust") for when in ("before", "after")}
    return row | named | {"radius_mean": row["radius"][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="folder of prepared data sets")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    rows = []
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(configuration(name, options.steps, options.data_dir, options.seed), Path(folder))
        rows.append(row)
        print(
            f"{name:20s} {row['steps']} steps, natural {row['before']['natural']:5.2f} -> "
            f"{row['after']['natural']:5.2f} %, PGD-10 {row['before']['robust']:5.2f} -> "
            f"{row['after']['robust']:5.2f} %, {row['seconds']:.0f} s",
            flush=True,
        )
    if options.json:
        write_results(options.json, torch.device("cpu"), COLUMNS, [flat(row) for row in rows])


if __name__ == "__main__":
    main()
