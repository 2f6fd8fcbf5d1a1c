r"""Trains the four models whose verdicts bench/verdicts.py compares, two of them adversarially.

    mwpb-fast data prepare cifar10 && mwpb-fast data prepare cifar4
    python bench/verdict_models.py
    python bench/verdicts.py runs/cifar4-at runs/digits-at runs/cifar10-natural runs/cifar4-wrn \
        --images 200 200 300 300 --json bench/results/verdicts-cpu.json

Three learn real CIFAR-10 images; digits-at is of the embedded digits. All are small and trained for a few epochs
only: right often enough, and wrong often enough, that attacks have something to decide. The same command goes on
after a stop; options of `mwpb-fast train`, such as --epochs 1, hold for all of them. A model whose data is not
there is named at the end, and the others are trained: exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mwpb_fast import train
from mwpb_fast.config import Config, recipe, resolve
from mwpb_fast.data import DataError

# without a ball there is nothing for an attack to do: one step of it costs least
NATURAL = "--budget.eps=0 --warmup.eps=0 --attack.steps=1 --epochs=4 --warmup_epochs=2 --optim.drops=[4,5]"
MODELS = {
    "cifar4-at": ("fair.at", "--epochs=3"),
    "digits-at": ("digits.mwpb_at", "--epochs=12"),
    "cifar10-natural": ("small.at", f"{NATURAL} --data.subset=3000 --model.name=smallresnet-8"),
    "cifar4-wrn": ("small.at", f"{NATURAL} --data.name=cifar4 --data.subset=3000 --model.name=wrn-10-1"),
}


def configuration(name: str, data_dir: str, options: Sequence[str] = ()) -> Config:
    """Of the model of that name; options: words of `mwpb-fast train`, which count last."""
    base, own = MODELS[name]
    return resolve(recipe(base), [], [*own.split(), f"--data.dir={data_dir}", *options])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data", help="folder of prepared data sets")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a run's folder is made in it for each")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    o, options = parser.parse_known_args(arguments)
    missing = []
    for name in o.only:
        try:
            train.run(configuration(name, o.data_dir, options), o.out / name)
        except DataError as error:
            missing.append(f"{name} is not trained: {error}")
            continue
        print(f"{name}: {o.out / name}", flush=True)
    for line in missing:
        print(line, file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
