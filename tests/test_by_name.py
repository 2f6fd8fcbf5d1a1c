"""What is there by its file's name alone: every value of every axis trains, every embedded set is a data set."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from mwpb_fast import train
from mwpb_fast.config import (
    AXES,
    Config,
    ConfigError,
    PrecisionConfig,
    check_axes,
    from_dict,
    load,
    names,
    recipe,
    resolve,
    to_dict,
)
from mwpb_fast.data import find_set, known_sets
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch, Method
from mwpb_fast.models import build_model

VALUES = [
    (axis, name)
    for axis, kind in AXES.items()
    if axis != "warmup"
    for name in names(kind)
    if hasattr(load(kind, name), "Config")
]
TINY = ("--model.name=smallresnet-8", "--data.subset=64", "--data.batch_size=32", "--data.validation=0",
        "--epochs=2", "--warmup_epochs=1", "--optim.drops=[]")  # fmt: skip


def fitting(axis: str, name: str) -> Config:
    """A run with that value, and on the other axes the first values that go with it."""
    others = [[f"--attack={n}"] for n in names("attacks")] if axis != "attack" else [[]]
    attacks = [[], ["--attack.count_correct=true"], *others] if axis != "attack" else others
    objectives = [[], *([f"--objective={n}"] for n in names("objectives"))] if axis != "objective" else [[]]
    budgets = [[], ["--budget=fixed"]] if axis != "budget" else [[]]
    for words in itertools.product(attacks, objectives, budgets):
        config = resolve(recipe("digits.mwpb_at"), [], [*TINY, f"--{axis}={name}", *itertools.chain(*words)])
        try:
            check_axes(config)
        except ConfigError:
            continue
        return config
    raise AssertionError(f"nothing goes with {axis} {name}")


@pytest.mark.parametrize(("axis", "name"), VALUES, ids=["-".join(value) for value in VALUES])
def test_every_value_of_an_axis_trains(axis: str, name: str, tmp_path: Path) -> None:
    """It explains itself, is written to YAML and read, and two epochs on digits have a loss and radii."""
    module = load(AXES[axis], name)
    assert inspect.getdoc(module)
    assert inspect.getdoc(module.Config), "its options are explained in --help by the docstring"
    config = fitting(axis, name)
    assert from_dict(to_dict(config)) == config
    record = train.run(config, tmp_path, quiet=True)
    assert (record["epoch"], record["bad_steps"]) == (2, 0)
    assert math.isfinite(record["loss"])
    assert 0 <= record["radius_min"] <= record["radius_mean"] <= record["radius_max"] <= 1
    radii = json.loads((tmp_path / "radii.json").read_bytes())["radii"]
    assert len(radii) == 64
    assert all(0 <= radius <= 1 for radius in radii)


@pytest.mark.parametrize("name", [name for axis, name in VALUES if axis == "attack"])
def test_every_attack_stays_in_each_ball_and_in_the_pixel_range(name: str) -> None:
    """A new tensor, in the balls of the budget or in those that the attack finds itself, at every epoch."""
    config = fitting("attack", name)
    model = build_model("smallresnet-8", num_classes=10, channels=1).eval()
    net = EagerNet(model, make_precision(PrecisionConfig(device="cpu")))
    whole = Method.build(config)
    whole.remember(8, torch.device("cpu"))
    x, y = torch.rand(8, 1, 8, 8).mul(1.4).sub(0.2).clamp(0, 1), torch.arange(8)
    batch, radius, before = Batch(x, y, torch.arange(8)), torch.linspace(0, 0.35, 8), x.clone()
    for epoch in (1, 100):
        method, notes = whole.in_epoch(epoch), {}
        key = torch.tensor([epoch])
        x_adv = method.attack(net, batch, net.logits(x), radius, method.objective.inner, key, notes)
        change = (x_adv.double() - x).flatten(1)
        distance = change.norm(dim=1) if config.attack.norm == "l2" else change.abs().amax(1)
        within = notes["radius"] if "radius" in config.attack.gives else radius
        assert (distance <= within.double() * (1 + 1e-6) + 1e-7).all(), f"{name} leaves its balls"
        assert 0 <= x_adv.min() <= x_adv.max() <= 1, f"{name} leaves [0, 1]"
        assert (x_adv.shape, x_adv.dtype, x_adv.requires_grad) == (x.shape, x.dtype, False)
        assert x_adv.data_ptr() != x.data_ptr(), f"{name} returns batch.x itself; return a copy"
        assert torch.equal(x, before), f"{name} changes batch.x"


@pytest.mark.parametrize("name", known_sets())
def test_every_set_is_one(name: str) -> None:
    """It is read from files or embedded; then both splits are checked here, and have nothing in common."""
    module = find_set(name)
    assert inspect.getdoc(module), "`mwpb-fast data list` shows its first line"
    if not hasattr(module, "images"):
        assert callable(module.read)
        return
    train_images, test_images = (module.images(name, split) for split in ("train", "test"))
    assert train_images.classes == test_images.classes
    assert train_images.images.shape[1:] == test_images.images.shape[1:]
    for images in (train_images, test_images):
        assert set(images.labels.tolist()) == set(range(images.num_classes))
    again = module.images(name, "train")
    assert torch.equal(again.images, train_images.images)
    assert torch.equal(again.labels, train_images.labels)
    pixels = {image.numpy().tobytes() for image in train_images.images}
    assert not pixels & {image.numpy().tobytes() for image in test_images.images}
