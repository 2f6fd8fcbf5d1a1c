"""A short training and its evaluation by PGD-20, through the Python interface alone: no jsonargparse is needed.

    python bench/short_training.py --archive cifar10-jpeg.tar.xz --epochs 4 --json result.json

MWPB-AT by the recipe of Table 1, its schedule shortened to the epochs given; the engine is the twin, on CUDA
with tuned convolutions and the captured step. Without --archive, scikit-learn's digits are trained on. It shows
that a run trains at speed; its accuracies say nothing about the paper's. The result file is written before the
evaluation, too, or with the epochs there are where the training does not come to its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import Results, leave_at_sigterm

from mwpb_fast import data, train
from mwpb_fast.config import Config, EvaluationConfig, PrecisionConfig, recipe
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.evaluation.evaluate import evaluate
from mwpb_fast.models import build_model, load_weights
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import read_records

COLUMNS = (
    ("data", "data", ""),
    ("model", "model", ""),
    ("epochs", "epochs", "d"),
    ("seconds_an_epoch", "s an epoch", ",.2f"),
    ("images_per_second", "images/s", ",.0f"),
    ("wait_share", "waiting for data", ".2%"),
    ("validation", "s a validation", ",.2f"),
    ("checkpoint", "s standing for checkpoints", ",.3f"),
    ("natural", "natural, %", ".1f"),
    ("pgd20", "PGD-20, %", ".1f"),
)


def configuration(o: argparse.Namespace, folder: Path) -> Config:
    """The recipe, its rate divided by ten in the last epoch, on the images that there are."""
    start = recipe("digits.mwpb_at" if o.archive is None else "table1.mwpb_at")
    images = dataclasses.replace(start.data, subset=o.subset or None)
    if o.archive is not None:
        data.prepare("cifar10", source=o.archive, dir=folder)
        images = dataclasses.replace(images, dir=str(folder))
    cuda = torch.device(o.device).type == "cuda"
    return dataclasses.replace(
        start,
        data=images,
        epochs=o.epochs,
        warmup_epochs=o.epochs // 2,
        model=dataclasses.replace(start.model, name=o.model or start.model.name),
        optim=dataclasses.replace(start.optim, drops=(max(1, o.epochs),)),
        precision=PrecisionConfig(device=o.device, engine="twin", tune=cuda, capture=cuda),
        evaluation=dataclasses.replace(start.evaluation, validate_every=max(1, o.epochs - 1)),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="CIFAR-10's, as `mwpb-fast data prepare --from` takes it")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--subset", type=int, default=0, help="train on so many images; 0: all")
    parser.add_argument("--test-images", type=int, default=0, help="attack so many test images; 0: all")
    parser.add_argument("--model", default="", help="instead of the recipe's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the result")
    o = parser.parse_args(arguments)
    part = "training and evaluation"
    results = Results(o.json, torch.device(o.device), COLUMNS, [part])
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(o, Path(folder))
        try:
            train.run(config, Path(folder) / "run", quiet=True)
        finally:
            records = read_records(Path(folder) / "run" / "metrics.jsonl")
            if records:
                results.put(part, [measured(config, records, o)], done=False)
        accuracies = evaluated(config, Path(folder), o)
    row = measured(config, records, o) | accuracies
    results.put(part, [row])
    shown = [(title, row[key], form) for key, title, form in COLUMNS if row[key] is not None]
    print(", ".join(f"{title} {format(value, form)}" for title, value, form in shown))


def measured(config: Config, records: list[dict[str, Any]], o: argparse.Namespace) -> dict[str, Any]:
    """The row of the epochs that there are, without accuracies. The first one records, tunes and warms up; where
    it is the only one there is no speed."""

    def of_later(key: str) -> float | None:
        found = [r[key] for r in records[1:] if key in r]
        return statistics.median(found) if found else None

    return {
        "data": config.data.name if o.archive is None else o.archive.name,
        "model": config.model.name,
        "epochs": len(records),
        "seconds_an_epoch": of_later("seconds"),
        "images_per_second": of_later("images_per_second"),
        "wait_share": of_later("wait_share"),
        "validation": of_later("validation"),
        "checkpoint": of_later("checkpoint"),
        "losses": [r["loss"] for r in records],
        "epoch_seconds": [r["seconds"] for r in records],
        "bad_steps": sum(r["bad_steps"] for r in records),
    }


def evaluated(config: Config, folder: Path, o: argparse.Namespace) -> dict[str, float]:
    """Accuracies of the last checkpoint, in float32."""
    found = checkpoint.read_newest(folder / "run" / "checkpoints", "last")
    assert found is not None
    images = data.load_split(config.data, "test")
    precision = make_precision(dataclasses.replace(config.precision, dtype="fp32"))
    model = build_model(config.model.name, num_classes=images.num_classes, channels=images.channels)
    load_weights(model, found[1]["model"])
    model = model.to(device=precision.device, memory_format=precision.memory_format).eval()  # type: ignore[call-overload]
    attacks = EvaluationConfig(
        attacks=("natural", "pgd20"),
        eps=config.evaluation.eps,
        step_size=config.evaluation.step_size,
        subset=o.test_images,
    )
    result = evaluate(model, images, attacks, precision, show=False)
    return {name: attack["accuracy"] for name, attack in result["attacks"].items()}


if __name__ == "__main__":
    leave_at_sigterm()
    main()
