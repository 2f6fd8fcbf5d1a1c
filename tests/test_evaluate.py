"""Evaluation: what the result holds, resuming, warnings, refusals; AutoAttack against the bare package."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from evaluate_cases import (
    EPS,
    PRECISION,
    config,
    flags_of,
    labelled,
    linear,
    one_thread,  # noqa: F401  # an autouse fixture
    package,
    run,
    short,  # noqa: F401  # a fixture
)

from mwpb_fast.config import ConfigError, EvaluationConfig
from mwpb_fast.evaluation import autoattack as aa
from mwpb_fast.evaluation import sharded
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.evaluate import evaluate
from mwpb_fast.evaluation.score import format_table, wilson
from mwpb_fast.models import build_model
from mwpb_fast.options import configure


@pytest.mark.usefixtures("short")
def test_result_says_everything_and_is_ordered(tmp_path: Path) -> None:
    model = linear()
    images = labelled(model)
    settings = config("natural", "pgd20", "pgd3", "cw20", "aa")
    result = evaluate(model, images, settings, PRECISION, folder=tmp_path / "evaluation", show=False)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert result["eps"] == "8/255"
    assert Fraction(result["eps"]) == EPS
    assert result["eps_float"] == 8 / 255
    assert (result["step_size"], result["norm"], result["seed"], result["n"]) == ("1/255", "linf", 0, 40)
    assert (result["format"], result["dtype"], result["preview"]) == (2, "float32", False)
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["pyautoattack"] == package.__version__
    attacks = result["attacks"]
    assert list(attacks) == list(settings.attacks)
    assert attacks["natural"]["flags"] == ("0" + "1" * 7) * 5
    assert attacks["natural"]["accuracy"] == 87.5
    worst = result["worst"]
    assert worst["flags"] == "".join(map(min, zip(*(a["flags"] for a in attacks.values()), strict=True)))
    for attack in attacks.values():
        assert len(attack["flags"]) == 40
        assert attack["correct"] == attack["flags"].count("1")
        assert attack["accuracy"] == 100 * attack["correct"] / 40
        assert attack["interval"][0] <= attack["accuracy"] <= attack["interval"][1]
        assert worst["accuracy"] <= attack["accuracy"]
        assert attack["seconds"] >= 0
    after = attacks["aa"]["after"]
    assert list(after) == ["clean", *aa.STANDARD]
    assert sorted(after.values(), reverse=True) == list(after.values())
    assert (after["clean"], after["square"]) == (87.5, attacks["aa"]["accuracy"])
    assert attacks["aa"]["accuracy"] <= attacks["pgd20"]["accuracy"] < 87.5  # the aim of a linear model is known
    assert attacks["aa"]["deviations"] == []
    text = format_table(result)
    assert "87.50 %" in text
    assert "eps 8/255" in text
    assert "preview" not in text


def test_pgd_finds_what_a_linear_model_must_lose() -> None:
    model = linear(2)
    weight = (model[1].weight[0] - model[1].weight[1]).detach()
    x = 0.3 + 0.4 * torch.rand(256, 3, 4, 4)
    with torch.no_grad():
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
        logits = model(x)
    y = logits.argmax(1)
    gap = (logits[:, 0] - logits[:, 1]).abs()
    robust = gap > weight.abs().sum() * float(EPS)  # the least |gap| that no corner of the ball can turn
    assert 0 < robust.sum() < 256
    for name in ("pgd20", "cw20"):
        flags = run(model, (x, y), config(name))["attacks"][name]["flags"]
        assert flags == sharded.bits(robust)


def test_wilson_interval() -> None:
    # p = 1/2, n = 4, z = 2: centre 1/2, half 2 / (1 + 1) * sqrt(1/16 + 4/64) = sqrt(1/8)
    assert wilson(2, 4, z=2.0) == pytest.approx((0.5 - 0.125**0.5, 0.5 + 0.125**0.5))
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1


def test_radius_zero_changes_nothing() -> None:
    model = linear()
    images = labelled(model)
    settings = EvaluationConfig(attacks=("natural", "pgd5"), eps=Fraction(0), step_size=Fraction(1, 255))
    attacks = run(model, images, settings)["attacks"]
    assert attacks["pgd5"]["flags"] == attacks["natural"]["flags"]


def test_subset_is_a_stratified_preview() -> None:
    model = linear()
    x, y = torch.rand(100, 3, 4, 4), torch.arange(10).repeat_interleave(10)
    result = run(model, (x, y), config("natural", subset=20))
    assert result["preview"] is True
    assert result["n"] == len(result["attacks"]["natural"]["flags"]) == 20
    assert "preview" in format_table(result)
    assert run(model, (x, y), config("natural", subset=100))["preview"] is False


def test_model_is_left_as_it_was() -> None:
    model = build_model("smallresnet-8", num_classes=10).eval()
    next(model.parameters()).requires_grad_(False)
    before = [(p.clone(), p.requires_grad) for p in model.parameters()]
    tf32 = torch.backends.cudnn.conv.fp32_precision
    images = torch.rand(6, 3, 8, 8), torch.arange(6)
    state = torch.random.get_rng_state()
    run(model, images, config("natural", "pgd2", "cw2"))
    for (value, wants), p in zip(before, model.parameters(), strict=True):
        assert torch.equal(value, p)
        assert p.requires_grad is wants
        assert p.grad is None
    assert torch.backends.cudnn.conv.fp32_precision == tf32
    assert torch.equal(state, torch.random.get_rng_state())


def test_linf_radius_beyond_the_range_of_images_is_refused() -> None:
    told = r"is (8|2), but images lie in \[0, 1\]: did you mean \1/255\?"
    for values in ({"eps": Fraction(8)}, {"step_size": Fraction(2)}):
        with pytest.raises(ValueError, match=told):
            EvaluationConfig(**values)
    with pytest.raises(ConfigError, match=f"eps {told}"):
        configure("table1.mwpb_at", {}, ["--evaluation.eps=8"])
    for name in ("pgd20@8", "aa@8", "pgd20@1/2:2"):
        with pytest.raises(ConfigError, match=f"evaluation.attacks: {name}: .*{told}"):
            find_attack(name)
    assert find_attack("pgd20@1:1").eps == 1
    assert find_attack("aa-l2@8").eps == 8


# shards ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("short")
def test_killed_evaluation_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "SHARD", 10)
    model = linear()
    images, settings = labelled(model), config("natural", "pgd3", "aa")
    whole = run(model, images, settings)
    folder = tmp_path / "evaluation"
    passes, kills = 0, 0

    def bomb() -> None:
        nonlocal passes
        passes += 1
        if passes in (2, 50, 400, 900):
            raise Killed

    while kills < 10:
        try:
            result = run(model, images, settings, folder=folder, tick=bomb)
            break
        except Killed:
            kills += 1
            assert not (tmp_path / "evaluation.json").exists()
    assert kills == 4
    assert flags_of(result) == flags_of(whole)
    assert result["attacks"]["aa"]["after"] == whole["attacks"]["aa"]["after"]
    assert sorted(p.name.split("-")[0] for p in folder.iterdir()) == ["aa"] * 4 + ["natural"] * 4 + ["pgd3"] * 4
    # a finished shard is not done again; a lost, damaged or foreign one is
    files = sorted(folder.glob("aa-*.json"))
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    files[1].write_text(files[1].read_text()[:40])
    files[2].write_text(files[2].read_text().replace('"shard": 2', '"shard": 1'))
    assert flags_of(run(model, images, settings, folder=folder)) == flags_of(whole)
    assert [a == b.stat().st_mtime_ns for a, b in zip(times, files, strict=True)] == [False, False, False, True]


def test_shards_of_another_model_radius_or_seed_are_not_taken(tmp_path: Path) -> None:
    model, folder = linear(), tmp_path / "e"
    images = labelled(model)
    run(model, images, config("pgd2"), folder=folder)
    run(model, images, config("pgd2"), folder=folder, seed=1)
    run(model, images, EvaluationConfig(attacks=("pgd2",), eps=2 * EPS, step_size=EPS), folder=folder)
    run(model, (images[0].flip(0), images[1]), config("pgd2"), folder=folder)
    with torch.no_grad():
        model[1].bias += 1
    run(model, images, config("pgd2"), folder=folder)
    assert len(list(folder.iterdir())) == 5


def test_shards_are_even_and_at_most_250() -> None:
    for n, sizes in ((1, [1]), (250, [250]), (251, [126, 125]), (360, [180, 180]), (10_000, [250] * 40)):
        parts = sharded.split(torch.arange(n))
        assert [len(part) for part in parts] == sizes
        assert torch.equal(torch.cat(parts), torch.arange(n))


# AutoAttack -----------------------------------------------------------------------------------------------------
