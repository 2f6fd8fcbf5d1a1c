"""Each class's accuracies and confusions, as numbers and as text; and the note on steps that are too short."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from evaluate_cases import config, flags_of, labelled, linear, run
from evaluate_cases import one_thread as one_thread  # an autouse fixture
from evaluate_cases import short as short  # a fixture

from mwpb_fast.config import EvaluationConfig
from mwpb_fast.data import Images
from mwpb_fast.evaluation.per_class import by_class, confusion, format_classes

ALL = ("natural", "fgsm", "pgd3x2@1/10", "apgd-ce@1/10", "square", "spsa1")


@pytest.mark.usefixtures("short")
def test_the_numbers_are_those_of_the_images(tmp_path: Path) -> None:
    model = linear()
    x, y = labelled(model)
    settings = config(*ALL, costly_subset=3)
    result = run(model, (x, y), settings, folder=tmp_path)
    assert run(model, (x, y), settings, folder=tmp_path)["attacks"] == result["attacks"]  # from its shards
    predicted = model(x).argmax(1)
    expected = [[int(((y == i) & (predicted == j)).sum()) for j in range(10)] for i in range(10)]
    assert result["attacks"]["natural"]["confusion"] == expected
    for name, attack in [*result["attacks"].items(), ("worst", result["worst"])]:
        labels = y[torch.tensor(attack.get("images", range(40)))]
        right = torch.tensor([flag == "1" for flag in attack["flags"]])
        for number, accuracy in enumerate(attack["per_class"]):
            here = right[labels == number].tolist()
            assert accuracy == (100 * sum(here) / len(here) if here else None)
        if name != "worst":
            table = torch.tensor(attack["confusion"])
            assert table.diag().sum() == attack["correct"]
            assert torch.equal(table.sum(1), labels.bincount(minlength=10))


def test_a_prediction_that_is_none_is_in_no_column() -> None:
    labels = torch.tensor([0, 0, 2, 2])
    assert confusion([0, -1, 1, 2], labels, 3) == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert by_class("1001", labels, 3) == [50.0, None, 50.0]


def test_text_names_the_classes_and_of_many_shows_the_mistakes() -> None:
    model = linear()
    x, y = labelled(model)
    pixels, names = (255 * x).round().to(torch.uint8), (*(f"kind {n}" for n in range(9)), "a long name")
    with torch.no_grad():
        y = model(pixels / 255).argmax(1)
    result = run(model, Images(pixels, y, names), config("natural", "fgsm"))
    lines = format_classes(result).splitlines()
    assert lines[0].split() == ["class", "natural", "fgsm", "worst"]
    assert [line.split("  ")[0].rstrip() for line in lines[2:12]] == result["classes"] == list(names)
    assert "100.00 %" in lines[2 + int(y[0])]
    assert lines.count("fgsm: images by class (rows) and predicted class (columns)") == 1

    many = linear(30)
    x = torch.rand(60, 3, 4, 4)
    with torch.no_grad():
        y = many(x).argmax(1)
    y[:7] = (y[0] + 1) % 30
    text = format_classes(run(many, (x, y), config("natural")))
    (table,) = text.split("\n\n")[1:]
    assert table.startswith("natural: the most frequent mistakes\n")
    found = [line.split() for line in table.splitlines()[3:]]
    assert {row[0] for row in found} == {str(int(y[0]))}
    assert sum(int(row[2]) for row in found) == 7


@pytest.mark.parametrize(
    ("attack", "noted"),
    [
        ("pgd15", True),
        ("pgd16", False),
        ("cw20@11/255", True),
        ("pgd4@8/255:4/255", False),
        ("pgd15-l2", True),
        ("pgd16-l2@1", False),
        ("fgsm", False),
        ("square", False),
    ],
)
@pytest.mark.usefixtures("short")
def test_steps_that_cannot_cross_the_ball_are_noted(attack: str, noted: bool) -> None:
    model, settings = linear(), EvaluationConfig(attacks=("natural", attack), eps=Fraction(8, 255), subset=2)
    notes = run(model, labelled(model), settings)["notes"]
    assert any("to cross the ball: " + attack in note for note in notes) == noted


def test_a_table_of_old_shards_is_said_to_be_missing(tmp_path: Path) -> None:
    """Shards of a version that kept no predictions: their flags are taken, and that there is no table is said."""
    model = linear()
    images = labelled(model)
    first = run(model, images, config("natural", "pgd2"), folder=tmp_path / "e")
    (shard,) = (tmp_path / "e").glob("pgd2-*.json")
    record = json.loads(shard.read_text(encoding="utf-8"))
    del record["predicted"], record["sha256"]
    shard.write_text(json.dumps(record), encoding="utf-8")
    second = run(model, images, config("natural", "pgd2"), folder=tmp_path / "e")
    assert flags_of(second) == flags_of(first)
    assert second["attacks"]["pgd2"]["confusion"] is None
    assert second["attacks"]["natural"]["confusion"] == first["attacks"]["natural"]["confusion"]
    assert "pgd2: no confusion table, since shards of an earlier version kept no predictions" in format_classes(
        second
    )
