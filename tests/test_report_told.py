"""What a reader would take wrongly unless it were said: other attacks, another recipe, few images, no run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_cases import attack, result, whole_run, write
from test_plots import make_run
from test_report import report

from mwpb_fast import cli
from mwpb_fast.report import chart, compare, training
from mwpb_fast.report.images import Looked, Shown
from mwpb_fast.report.judged import judge
from mwpb_fast.report.read import read


def test_what_is_nearly_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [whole_run(tmp_path / "out" / "runs" / "name" / f"seed{i}") for i in range(5)]
    weights = runs[0] / "checkpoints" / "best-00030-0000000.safetensors"
    for file in (weights, tmp_path / "resnet18.pth"):
        file.write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for target, said in (
        (tmp_path / "out", f"holds 5 runs: {runs[0]} {runs[1]} {runs[2]} and 2 more"),
        (runs[3].parent.parent, "holds 5 runs"),
        (tmp_path / "resnet18.pth", "is a file, where the folder of a run is wanted; for the accuracy of "),
        (weights, f"its run is {runs[0]}"),
        (tmp_path / "empty", "has no config.yaml"),
    ):  # fmt: skip
        for command in ("report", "plot"):
            assert cli.main([command, str(target)]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert said in error


def test_worst_cases_over_other_attacks_do_not_stand_beside_one_another(tmp_path: Path) -> None:
    """The first run was not attacked by AutoAttack: beside the second's own worst case stands that over PGD, which
    both have, from the images' flags; the difference is over these too."""
    runs = [whole_run(tmp_path / "a", "digits.at"), whole_run(tmp_path / "b")]
    for run in runs:
        (run / "trust-best.json").unlink()
    alike = report(*runs).text
    assert "run robust natural can it be believed? worst of" in alike
    assert alike.count("pgd20, aa at linf 8/255") == 2
    assert "not attacked alike" not in alike
    without = result(worst=attack("1" * 60 + "0" * 40) | {"of": ["natural", "pgd20"]})
    del without["attacks"]["aa"]
    write(runs[0] / "evaluation-best.json", without)
    told = report(*runs).text
    assert "run robust, worst of pgd20 natural can it be believed? own worst case worst of" in told
    assert re.search(
        r"digits.mwpb_at 60.00 % \([^)]*\) 90.00 % .{,40} 50.00 % \([^)]*\) pgd20, aa at linf 8/255", told
    )
    assert "The runs were not attacked alike. Compare the worst of pgd20" in told
    one, two = (judge(read(run)).headline for run in runs)
    assert [d.attack for d in compare.differences(one, two)] == ["natural", "pgd20"]
    for other, entry in ((without, "1" * 50 + "0" * 50), (result(), "1" * 45 + "0" * 50 + "1" * 5)):
        other["attacks"]["cw20"] = attack(entry, norm="linf", eps="8/255")
        other["worst"]["of"] = [*other["attacks"]]
        write(runs["aa" in other["attacks"]] / "evaluation-best.json", other)
    one, two = (judge(read(run)).headline for run in runs)
    last = compare.differences(one, two)[-1]
    assert (last.attack, last.points) == ("worst of pgd20, cw20", -5)
    without["attacks"]["pgd20"]["eps"] = without["attacks"]["cw20"]["eps"] = "4/255"
    write(runs[0] / "evaluation-best.json", without)
    assert "not to be compared" in report(*runs).text


def test_attacks_at_another_radius_make_no_robust_accuracy(tmp_path: Path) -> None:
    """Nor do they count as AutoAttack at the radius of the evaluation."""
    run = whole_run(tmp_path / "run")
    (run / "trust-best.json").unlink()
    found = result(worst=attack("1" * 90 + "0" * 10) | {"of": ["natural"]})
    for name in ("pgd20", "aa"):
        found["attacks"][f"{name}@4/255"] = found["attacks"].pop(name) | {"eps": "4/255"}
    write(run / "evaluation-best.json", found)
    judged = judge(read(run))
    assert judged.robust is None
    assert judged.natural is not None
    assert any(reason.startswith("no AutoAttack") for _, reason in judged.reasons)
    assert "robust at" not in report(run).text


def test_a_run_that_departs_from_its_recipe_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "hanged" not in report(run).text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"epochs": 1, "seed": 7, "objective": {"name": "trades", "beta": 5.0}}
    config["data"] |= {"subset": 256, "dir": "elsewhere"}
    config["optim"]["drops"] = [2, 3]

    def told(**changes: Any) -> str:
        (run / "config.yaml").write_text(yaml.safe_dump(config | changes))
        return report(run).text

    said = "data.subset 256 instead of all; objective trades instead of at; optim.drops 2, 3 "
    assert "digits.mwpb_at, changed Changed from the recipe: " + said in told()
    assert "epochs 1 instead of 30; objective.beta 5.0. smallresnet-16 on digits" in told()
    assert "digits.mwpb_at Changed from the recipe" in report(run, make_run(tmp_path / "other", "digits.at")).text
    for recipe in ("digits.none", "none.at", "absent.module.recipe", "1"):
        assert "This version has no such recipe" in told(recipe=recipe)


def test_counted_things_and_times(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    record = {"epoch": 1, "phase": "main", "images_per_second": 500, "seconds": 17.9}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\nno record\n")
    told = report(run).text
    assert "18 s in training steps" in told
    assert "as no records: 1 line" in told


def test_classes_say_of_how_many_images(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    (run / "trust-best.json").unlink()
    assert "of each class" not in report(run).text
    for rows, said in (
        ([[50, 0], [10, 40]], "50 test images of each class: an accuracy of 50 % is known to ±13 points."),
        ([[36, 4], [10, 50]], "40 to 60 test images of each class: an accuracy of 50 % is known to ±15 points."),
    ):
        found = result()
        found["attacks"]["natural"]["confusion"] = rows
        write(run / "evaluation-best.json", found)
        assert said in report(run).text
    assert "cat 40 100.0 %" in report(run).text
    found["attacks"]["natural"]["confusion"] = [[36, 4], [10, 49]]  # one of the 100 is in no row
    write(run / "evaluation-best.json", found)
    assert "of each class" not in report(run).text


def test_names_below_a_chart_are_not_cut_off() -> None:
    names = ["automobile", "a-name-longer-than-others"]
    picture = chart.Chart("", chart.Axis("", -0.5, 9.5), chart.Axis("%", 0, 1), bottom=chart.below_slanted(names))
    picture.below(0, names[1], slanted=True)
    found = re.search(r'x="([\d.]+)" y="(\d+)" text-anchor="end" transform="rotate\((-\d+)', picture.figure())
    assert found
    x, y, angle = map(float, found.groups())
    assert angle == -chart.SLANT
    wide = chart.LETTER * chart.LETTERS
    assert x - wide * 0.643 > 0  # the cosine of 50 degrees
    assert y + wide * 0.766 < picture.height


def test_radius_and_time_stand_at_the_top(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    records = [{"epoch": e, "phase": "main", "seconds": 2000.0} for e in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    os.utime(run / "metrics.jsonl", (86400, 86400))
    told = report(run).text
    first = told[: told.index("Can it be believed?")]
    assert "Trained until 1970-01-02 00:00 UTC, 1 h 6 min in training steps." in first
    assert "robust at linf 8/255" in first


def test_eps_and_alpha_are_in_the_chart_of_the_radii(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    told = report(run).text
    assert "eps, and exp(±alpha) eps" in told
    assert "Budget: fixed (eps 16/255) up to epoch 20, then margin (eps 32/255, alpha 0.58)." in told
    other = report(make_run(tmp_path / "other", "digits.at")).text
    assert "±alpha" not in other
    assert "Budget: fixed (eps 32/255)." in other


def test_words_under_an_image() -> None:
    shown = [Shown(i, "9", ("data:,",) * 3, (0.5, -0.25), seen) for i, seen in enumerate((("9", "1"), ("1", "1")))]
    cells = "".join(training.grid(Looked([], shown, "8/255", "1/255")))
    assert "9: seen as 9, attacked as 1" in cells
    assert "9: seen as 1, also when attacked" in cells
    assert "margin +0.50, attacked -0.25" in cells
