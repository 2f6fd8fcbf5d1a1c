"""Costly attacks see a part of the images; evaluations that are killed go on; every entry has its numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    EPS,
    config,
    flags_of,
    labelled,
    linear,
    one_thread,  # noqa: F401  # an autouse fixture
    run,
    short,  # noqa: F401  # a fixture
)

from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluation import catalog, sharded
from mwpb_fast.evaluation.contract import AttackSetting, Outcome
from mwpb_fast.evaluation.score import format_table, worst
from mwpb_fast.evaluation.spsa import SPSA


@pytest.fixture
def cheap_spsa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog.NAMED, "spsa", catalog.by_samples(SPSA(pairs=4, iterations=3)))


@pytest.mark.usefixtures("cheap_spsa")
def test_costly_attack_has_a_fixed_part_of_the_images(tmp_path: Path) -> None:
    model = linear()
    x, y = labelled(model, 100)
    settings = config("natural", "pgd20", "spsa", costly_subset=30)
    result = run(model, (x, y), settings, folder=tmp_path / "e")
    spsa = result["attacks"]["spsa"]
    chosen = spsa["images"]
    assert (spsa["n"], len(spsa["flags"]), len(set(chosen)), result["n"]) == (30, 30, 30, 100)
    assert chosen == sorted(chosen)
    assert not result["preview"]
    assert "spsa: a fixed part of the images, 30 of them" in format_table(result)
    # an evaluation of a part, as long as it holds them, attacks the same, and takes their shards
    files = {path.name for path in (tmp_path / "e").glob("spsa*")}
    part = run(model, (x, y), replace(settings, subset=60), folder=tmp_path / "e")
    assert part["attacks"]["spsa"]["images"] == chosen
    assert {path.name for path in (tmp_path / "e").glob("spsa*")} == files
    # one that is smaller attacks all of its images
    small = run(model, (x, y), replace(settings, subset=20))
    assert "images" not in small["attacks"]["spsa"]
    assert small["worst"]["of"] == ["natural", "pgd20", "spsa"]
    assert "worst_common" not in small
    whole = run(model, (x, y), replace(settings, costly_subset=0))
    assert "images" not in whole["attacks"]["spsa"]
    assert "".join(whole["attacks"]["spsa"]["flags"][i] for i in chosen) == spsa["flags"]


@pytest.mark.usefixtures("cheap_spsa")
def test_worst_case_never_mixes_images_that_an_attack_did_not_see() -> None:
    model = linear()
    result = run(model, labelled(model, 100), config("natural", "pgd20", "spsa", "pgd20@12/255", costly_subset=30))
    natural, pgd, spsa, _ = result["attacks"].values()
    worst, common = result["worst"], result["worst_common"]
    assert worst["of"] == ["natural", "pgd20"]
    assert worst["flags"] == "".join(map(min, zip(natural["flags"], pgd["flags"], strict=True)))
    assert common["of"] == ["natural", "pgd20", "spsa"]
    assert common["images"] == spsa["images"]
    assert common["n"] == len(common["flags"]) == 30
    for number, image in enumerate(common["images"]):
        three = natural["flags"][image], pgd["flags"][image], spsa["flags"][number]
        assert common["flags"][number] == min(three)
    text = format_table(result)
    assert "worst of natural, pgd20 " in text
    assert "worst of natural, pgd20, spsa, on 30 images" in text


def test_worst_case_by_hand() -> None:
    ball = {"norm": "linf", "eps": "8/255"}
    results: dict[str, Any] = {
        "a": {"flags": "1110", **ball},
        "b": {"flags": "011", "images": [3, 7, 9], **ball},
        "c": {"flags": "0000", "norm": "l2", "eps": "8/255"},
        "d": {"flags": "0000", "norm": "linf", "eps": "9/255"},
    }
    found = worst(results, [3, 5, 7, 9], AttackSetting(EPS, EPS, None))  # type: ignore[arg-type]
    assert (found["worst"]["flags"], found["worst"]["of"]) == ("1110", ["a"])
    assert (found["worst_common"]["flags"], found["worst_common"]["images"]) == ("010", [3, 7, 9])
    assert worst({"c": results["c"]}, [3, 5, 7, 9], AttackSetting(EPS, EPS, None)) == {}  # type: ignore[arg-type]


@pytest.mark.usefixtures("cheap_spsa", "short")
def test_killed_evaluation_of_any_attack_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "SHARD", 10)
    model = linear()
    images = labelled(model)
    settings = config("spsa", "square@4/255", "pgd3x2", "fab", costly_subset=25)
    whole = run(model, images, settings)
    passes, kills = 0, 0

    class Killed(BaseException):
        pass

    def bomb() -> None:
        nonlocal passes
        passes += 1
        if passes in (30, 90, 400):
            raise Killed

    while kills < 5:
        try:
            result = run(model, images, settings, folder=tmp_path / "e", tick=bomb)
            break
        except Killed:
            kills += 1
    assert kills == 3
    assert flags_of(result) == flags_of(whole)
    for name in settings.attacks:
        assert result["attacks"][name]["forwards"] == whole["attacks"][name]["forwards"]
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "e").iterdir())
    assert names == ["fab"] * 4 + ["pgd3x2"] * 4 + ["spsa"] * 3 + ["square"] * 4


def test_values_come_back_from_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "SHARD", 10)
    probe = catalog.EvaluationAttack(
        lambda model, x, y, index, setting: Outcome(torch.ones(len(y), dtype=torch.bool), values={"v": index / 2}),
        forwards=1,
    )
    model = linear()
    for _ in range(2):
        result = run(model, labelled(model), config("natural"), folder=tmp_path / "e", probes={"probe": probe})
        assert result["attacks"]["probe"]["values"]["v"] == [i / 2 for i in range(40)]
        assert result["worst"]["of"] == ["natural"]


def test_every_entry_has_its_numbers() -> None:
    model = linear()
    images = labelled(model, 16)
    result = run(model, images, EvaluationConfig(attacks=("natural", "fgsm", "pgd2", "spsa2"), eps=EPS))
    for name, entry in result["attacks"].items():
        assert entry["interval"][0] <= entry["accuracy"] <= entry["interval"][1]
        assert entry["seconds"] >= 0
        assert entry["forwards"] >= 16
        assert (name == "natural") == ("eps" not in entry)
    assert result["attacks"]["pgd2"]["forwards"] == 3 * 16
    assert result["attacks"]["pgd2"]["step_size"] == "1/255"
    assert "step_size" not in result["attacks"]["fgsm"]
    assert result["attacks"]["spsa2"]["parameters"] == {
        "pairs": 2, "iterations": 100, "delta": 0.001, "learning_rate": 0.01,
    }  # fmt: skip
