"""As released, and what in it does the work: the recipes, one step of them, and how their tables are rendered."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import numpy as np
import pytest
import torch
from reproduce_cases import fake_evaluation, fake_training, runs_of

from mwpb_fast.config import PrecisionConfig, recipe, to_dict
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.evaluation.score import interval, statistics
from mwpb_fast.method import Batch, Method
from mwpb_fast.models import build_model
from mwpb_fast.optim import learning_rate, make_optimizer
from mwpb_fast.reproduce import render
from mwpb_fast.reproduce.gather import gather
from mwpb_fast.reproduce.report import publish
from mwpb_fast.reproduce.tables import TABLES, find_table
from mwpb_fast.step import Step

CPU = make_precision(PrecisionConfig(device="cpu", dtype="fp32"))


# the recipes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", [row.name for row in TABLES["released"].rows])
def test_the_released_settings(row: str) -> None:
    """methods.md, section 1.1, the table of the released code."""
    config = recipe(f"released.{row}")
    two_phase = not row.startswith("at")
    assert config.model.name == ("resnet-18" if row.endswith("resnet18") else "wrn-34-10")
    assert (config.epochs, config.warmup_epochs, config.natural_pass) == (120, 80 if two_phase else 0, True)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.momentum) == (0.1, 5e-4, 0.9)
    assert (config.optim.clip_norm, config.data.batch_size, config.attack_mode) == (1.0, 128, "eval")
    rates = {epoch: learning_rate(config.optim, epoch) for epoch in (74, 75, 89, 90, 99, 100, 120)}
    expected = {74: 0.1, 75: 0.01, 89: 0.01, 90: 1e-3, 99: 1e-3, 100: 1e-4, 120: 1e-4}
    assert rates == pytest.approx(expected, rel=1e-12)
    assert (float(config.budget.eps), float(config.warmup.eps)) == (0.031, 0.0155)
    assert config.attack.start == "gaussian"
    radius = torch.tensor([0.0155, 0.04])
    steps = {epoch: config.attack.build().in_epoch(epoch).step_size(radius).tolist() for epoch in (80, 81)}
    quarter = [0.0155 / 4, 0.01]
    assert steps[81] == pytest.approx(quarter)
    assert steps[80] == pytest.approx([0.0035, 0.0035] if two_phase else quarter)
    evaluation = config.evaluation
    assert (evaluation.eps, evaluation.step_size) == (Fraction(31, 1000), Fraction(3, 1000))
    assert getattr(config.budget, "alpha", 0.0) == (0.52 if "wpb" in row else 0.0)


@pytest.mark.parametrize("table", ["ablation", "fair"])
def test_rows_differ_from_their_controls_in_one_thing(table: str) -> None:
    for row in TABLES[table].rows:
        if row.control:
            mine, theirs = (to_dict(recipe(f"{table}.{name}")) for name in (row.name, row.control))
            groups = {key for key in mine if mine[key] != theirs[key]} - {"recipe"}
            if groups == {"budget", "warmup_epochs"}:  # the warm-up alone: the budgets are one and the same radius
                assert theirs["budget"] == {"name": "fixed", "eps": "8/255"} or row.name == "at", row.name
            else:
                assert len(groups) == 1, (row.name, groups)
                assert groups < {"budget", "natural_pass", "optim"}, row.name


def test_an_attacks_own_warm_up_is_one_phase() -> None:
    method = Method.build(recipe("released.mwpb_at"))
    assert method.in_epoch(1) == method.in_epoch(80) != method.in_epoch(81) == method.in_epoch(120)
    plain = Method.build(recipe("table1.at"))
    assert plain.in_epoch(1).attack == plain.attack


# a step -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("epoch", "first_step"), [(80, 0.0035), (81, None)])
def test_a_step_as_released_is_what_plain_float64_makes_of_it(epoch: int, first_step: float | None) -> None:
    """Margin and attack in eval mode; x then x' in train mode; the gradient of CE(x') clipped to norm 1; SGD."""
    config = recipe("released.mwpb_at")
    torch.manual_seed(5)
    model = build_model("smallresnet-16", num_classes=10, channels=3)
    plain = build_model("smallresnet-16", num_classes=10, channels=3).double()
    plain.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(7)
    x, y = torch.rand(16, 3, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator)
    index, key = torch.arange(16), torch.tensor([ops.derive_seed(1, epoch)])
    step = Step(
        model=model,
        net=EagerNet(model, CPU),
        optimizer=make_optimizer(model, config.optim),
        precision=CPU,
        attack_mode=config.attack_mode,
        natural_pass=config.natural_pass,
        clip_norm=config.optim.clip_norm,
    )
    result = step(Batch(x, y, index), key, Method.build(config).in_epoch(epoch))

    cross_entropy = torch.nn.functional.cross_entropy
    plain.eval()
    x_adv, x = ops.gaussian_start(x, 0.001, key, index).double(), x.double()
    p = plain(x).softmax(1).detach()
    own = p.gather(1, y[:, None])[:, 0]
    margin = own - p.scatter(1, y[:, None], -1.0).amax(1)
    radius = torch.full_like(own, 0.0155) if first_step else 0.031 * torch.exp(0.52 * margin)
    r = radius[:, None, None, None]
    for _ in range(10):
        leaf = x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(plain(leaf), y), leaf)
        moved = leaf.detach() + (first_step or r / 4) * gradient.sign()
        x_adv = moved.clamp(x - r, x + r).clamp(0, 1)
    plain.train()
    with torch.no_grad():
        plain(x)
    loss = cross_entropy(plain(x_adv), y)
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()

    assert norm > 1
    assert result.norm.item() == pytest.approx(norm.item(), rel=1e-3)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(result.radius.double(), radius, rtol=1e-5, atol=0)
    for ours, w, g in zip(model.parameters(), plain.parameters(), gradients, strict=True):
        clipped = g / norm
        torch.testing.assert_close(ours.grad, clipped.float(), rtol=1e-3, atol=1e-5)
        after = w.detach() - 0.1 * (clipped + 5e-4 * w.detach())
        torch.testing.assert_close(ours.detach(), after.float(), rtol=1e-3, atol=1e-5)
    buffers = dict(plain.named_buffers())
    for name, value in model.named_buffers():
        torch.testing.assert_close(value.double(), buffers[name].double(), rtol=1e-3, atol=1e-5, msg=name)


# the tables ---------------------------------------------------------------------------------------------------
def test_an_interval_by_hand() -> None:
    """t of two degrees of freedom at 97.5 % is 4.30265."""
    found = interval(statistics([3.0, 2.0, 4.0]))
    assert found == pytest.approx([3 - 4.302653 / 3**0.5, 3 + 4.302653 / 3**0.5], rel=1e-6)
    assert interval(statistics([3.0])) is None


def test_what_so_many_seeds_can_find(bench: Any) -> None:
    """Published: ten pairs find one standard deviation with a power of 80.3 %. Three find 3.3 of them."""
    power = bench("power")
    assert power.detectable(1.0, 10, power=0.803) == pytest.approx(1.0, abs=2e-3)
    assert power.detectable(2.0, 3) == pytest.approx(2 * power.detectable(1.0, 3))
    small = json.loads((Path(power.__file__).parent / "results/small/table.json").read_bytes())
    found = list(power.lines(small, [3, 5]))
    assert len(found) == 1 + 2 * 4
    measured = small["rows"][2]["cells"]["pgd"]["best"]["control"]["std"]
    assert f"{measured:8.2f} {power.detectable(measured, 3):10.2f}" in found[3]


@pytest.fixture
def fair(tmp_path: Path) -> list[Any]:
    runs = runs_of("fair", tmp_path, "control,mwpb,equal")
    values = {"control": (70.0, 71.0, 75.0), "mwpb": (73.0, 73.0, 79.0), "equal": (70.0, 71.0, 75.0)}
    for run in runs:
        fake_training(run, [0.02, 0.03], best=12)
        fake_evaluation(run, "best", {"natural": values[run.row.name][run.config.seed]})
    return runs


def test_differences_are_shown_with_their_intervals(fair: list[Any]) -> None:
    lines = render.markdown(gather(find_table("fair"), fair)).splitlines()
    mwpb = lines.index(next(line for line in lines if line.startswith("| MWPB-AT | ours, best | 75.00 ± 3.46 |")))
    assert lines[mwpb + 1].startswith("|  | ours - two-phase control, best | +3.00 ± 1.00 | - | - | +0.0000")
    assert lines[mwpb + 2].startswith("|  | 95 % interval | +0.52 to +5.48 | - | - | +0.0000 to +0.0000")
    assert any(line.startswith("|  | 95 % interval | +0.00 to +0.00 |") for line in lines[mwpb + 3 :])
    small = runs_of("small", fair[0].folder.parents[2])
    assert "interval" not in render.markdown(gather(find_table("small"), small))


def test_radii_over_the_epochs_are_drawn(fair: list[Any], tmp_path: Path) -> None:
    """Also of a log without quantiles."""
    pytest.importorskip("matplotlib")
    from mwpb_fast.reproduce import figures

    result, written, reason = publish(find_table("fair"), fair, tmp_path / "out")
    assert reason == ""
    assert [path.name for path in written[3:]] == ["table.png", "radii.png"]
    folders = {run.row.name: run.folder for run in fair if run.config.seed == 0}
    log = folders["mwpb"] / "metrics.jsonl"
    log.write_text("".join(f'{{"epoch": {n}, "radius_p50": {n / 255}, "radius_mean": 0.1}}\n' for n in (1, 2, 3)))
    figure = figures.radii_over_epochs(result, folders)
    assert [axis.get_title() for axis in figure.axes[:3]] == [
        "two-phase control, seed 0", "MWPB-AT, seed 0", "MWPB-AT's mean radius for all, seed 0",
    ]  # fmt: skip
    median, mean = figure.axes[1].lines
    assert list(median.get_ydata()) == pytest.approx([1, 2, 3])  # type: ignore[arg-type]
    assert list(mean.get_ydata()) == pytest.approx([25.5] * 3)  # type: ignore[arg-type]
    assert all(axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 25.5 for axis in figure.axes)


# the data -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["binary", "folders"])
def test_cifar4_is_the_first_four_classes(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from mwpb_fast.data import cifar, cifar4
    from mwpb_fast.data.archive import open_tree
    from mwpb_fast.data.decode import Arrays

    monkeypatch.setattr(cifar, "_SPLIT_SIZE", {"train": 10, "test": 10})
    with tarfile.open(tmp_path / "x.tar", "w") as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        names = cifar._CIFAR10.split()
        if form == "binary":
            records = [bytes([label]) + bytes([20 * label] * 3072) for label in range(10)]
            for number in range(5):
                add(f"c/data_batch_{number + 1}.bin", b"".join(records[2 * number : 2 * number + 2]))
            add("c/test_batch.bin", b"".join(records))
        else:
            for label, name in enumerate(names):
                image = io.BytesIO()
                Image.new("RGB", (32, 32), (20 * label,) * 3).save(image, "PNG")
                for split in ("train", "test"):
                    add(f"{split}/{name}/0.png", image.getvalue())
    with open_tree(tmp_path / "x.tar") as tree:
        raw = cifar4.read(tree, "cifar4")
        assert raw.classes == ("airplane", "automobile", "bird", "cat")
        for data in (raw.train, raw.test):
            assert data.labels.tolist() == [0, 1, 2, 3]
            if isinstance(data, Arrays):
                assert np.unique(data.images).tolist() == [0, 20, 40, 60]
            else:
                assert [Path(name).parent.name for name in data.names] == list(raw.classes)
                assert len(data.contents) == 4
    assert dataclasses.replace(recipe("fair.at").data, subset=None, name="") == dataclasses.replace(
        recipe("table1.at").data, name=""
    )
