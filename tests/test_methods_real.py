"""Fifty steps of ResNet-18 on real CIFAR-10 images with every published method, without a NaN.

A row of METHODS is a method's name, its options on top of small.at or another recipe, and nothing else, so that
another method is one more row.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mwpb_fast import data, train
from mwpb_fast.config import recipe, resolve
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import read_records

pytestmark = pytest.mark.slow

MMA = ("small.at", "--objective=mma", "--attack=anpgd", "--budget.eps=32/255")
ST = ("--objective=st", "--attack=squeeze", "--attack_mode=batch")
IAAT = ("--attack=adaptive", "--attack_mode=train")
METHODS = {
    "awp": ("small.at", "--perturbation=awp"),
    "mwpb-awp": ("small.mwpb_at", "--perturbation=awp"),
    "trades-awp": ("small.trades", "--perturbation=awp", "--perturbation.gamma=0.005"),
    "mma": MMA,
    "mwpb-mma": ("small.mwpb_at", *MMA[1:3], "--budget.eps=8/255"),
    "st": ("small.at", *ST),
    "mwpb-st": ("small.mwpb_at", *ST),
    "iaat": ("small.at", *IAAT, "--attack.warmup_epochs=1"),
    "iaat-trades": ("small.trades", *IAAT, "--attack.warmup_epochs=0"),
    "wat": ("small.at", "--objective=wat"),
    "mwpb-mail": ("small.mwpb_at", "--objective=mail", "--objective.burn_in_epochs=1"),
    "gairat": ("small.at", "--objective=gairat", "--objective.burn_in_epochs=1", "--attack.count_correct=true"),
}
BATCH, STEPS = 4, 50


@pytest.fixture(scope="session")
def cifar(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    data.prepare("cifar10", source=shared_data / "cifar10-jpeg.tar.xz", dir=folder)
    return folder


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_fifty_steps_of_resnet_18_are_finite(cifar: Path, tmp_path: Path, method: str) -> None:
    """Two epochs of 25 batches, so that warm-ups of one epoch and remembered radii are crossed."""
    name, *options = METHODS[method]
    small = [
        f"--data.dir={cifar}",
        f"--data.subset={BATCH * STEPS // 2}",
        f"--data.batch_size={BATCH}",
        "--data.validation=0",
        "--model.name=resnet-18",
        "--optim.lr=0.01",
        "--epochs=2",
        "--warmup_epochs=0",
        "--max_bad_steps=0",
    ]
    train.run(resolve(recipe(name), [], [*small, *options]), tmp_path, quiet=True)
    records = read_records(tmp_path / "metrics.jsonl")
    assert len(records) == 2
    for record in records:
        assert math.isfinite(record["loss"])
        assert record["bad_steps"] == 0
    state = checkpoint.read_newest(tmp_path / "checkpoints", "last")
    assert state is not None
    assert state[1]["model"]["bn1.num_batches_tracked"] >= STEPS
    for key, value in state[1]["model"].items():
        assert value.isfinite().all(), key
