"""Reports of runs: what is said first, what is missing, who is compared with whom, and that nothing gets out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_cases import Page, result, verdicts, whole_run, write
from test_plots import make_run

from mwpb_fast import cli
from mwpb_fast.report import compare, curves
from mwpb_fast.report.chart import Axis, span
from mwpb_fast.report.judged import judge
from mwpb_fast.report.markup import element, text
from mwpb_fast.report.page import page
from mwpb_fast.report.read import read

HOSTILE = "</title><script>alert(1)</script><img src=x onerror='alert(2)' \"\u202e\x07\udcff"


def report(*folders: Path, looked: str = "left out") -> Page:
    return Page(page([read(folder) for folder in folders], [looked] * len(folders)))


# the file -----------------------------------------------------------------------------------------------------
def test_one_file_that_asks_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole_run(tmp_path / "run")
    assert cli.main(["report", str(run), "--no-images"]) == 0
    assert capsys.readouterr().out == f"written: {run / 'report.html'}\n"
    source = (run / "report.html").read_text(encoding="utf-8")
    assert len(source) < 3 * 2**20
    found = Page(source)
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in found.elements}
    assert not re.search(r"url\(|@import|https?:", source)
    assert all(link.startswith(("#", "data:")) for name in ("src", "href") for link in found.having(name))
    targets = set(found.having("id"))
    assert len(targets) == len(found.having("id"))
    assert {link[1:] for link in found.having("href") if link.startswith("#")} <= targets
    assert "default-src 'none'" in "".join(found.having("content"))


def test_what_it_is_and_whether_it_can_be_trusted_come_first(tmp_path: Path) -> None:
    told = report(whole_run(tmp_path / "run")).text
    first = told[: told.index("Learning", told.index("Can it be believed?"))]
    for part in ("50.0 %", "90.0 %", "Can be believed", "2 of 2 checks", "by its SHA-256", "100 test images"):
        assert part in first
    for part in ("Accuracy by class", "Radii of the training images", "Accuracy at rising radii", "eager fp32",
                 "Weakest: dog", "twin fp32, by a trial", "a processor", "config.yaml"):  # fmt: skip
        assert part in told


def test_every_chart_says_what_it_shows(tmp_path: Path) -> None:
    found = report(whole_run(tmp_path / "run"))
    labels = [
        attributes.get("aria-label") for tag, attributes in found.elements if attributes.get("role") == "img"
    ]
    assert len(labels) >= 6
    assert all(label and len(label) > 20 for label in labels)
    regions = [attributes for _, attributes in found.elements if attributes.get("role") == "region"]
    assert regions
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in regions)


# what is not there ----------------------------------------------------------------------------------------------
def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    make_run(tmp_path / "run", epochs=0)
    (tmp_path / "run" / "radii.json").unlink()
    told = report(tmp_path / "run").text
    assert "Not evaluated yet" in told
    assert "No epoch is done yet" in told
    assert "radii.json is not there yet" in told
    assert f"mwpb-fast evaluate {tmp_path / 'run'}" in told


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"radii": 3, "attacks": [], "chosen": 1}', "\xff"])
@pytest.mark.parametrize(
    "name",
    ["radii.json", "evaluation-best.json", "trust-best.json", "engine.json", "environment.json", "metrics.jsonl"],
)
def test_a_damaged_file_is_said_and_ends_nothing(tmp_path: Path, name: str, content: str) -> None:
    run = whole_run(tmp_path / "run")
    (run / name).write_bytes(content.encode("latin-1") + b"\n")
    told = report(run).text
    engine_alone = name in ("engine.json", "environment.json") and content.startswith('{"')
    empty_log = name == "metrics.jsonl" and not content
    assert engine_alone or empty_log or name in told
    assert "How good?" in told


@pytest.mark.parametrize("change", [
    {"attacks": {"natural": {"accuracy": 1}}}, {"n": None}, {"eps": "0/0"}, {"warnings": []}, {"classes": 3},
    {"worst": {}}, {"verdicts": [1]}, {"attacks": {}, "worst": {"accuracy": 1, "interval": [0, 1], "flags": "2"}},
])  # fmt: skip
def test_a_result_of_another_shape_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    run = whole_run(tmp_path / "run")
    write(run / "evaluation-best.json", result(**change))
    assert "evaluation-best.json is not what a run writes" in report(run).text


def test_records_with_nothing_in_them_are_drawn_without(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    odd = {"loss": None, "robust": "x", "radius_min": [], "learning_rate": True, "images_per_second": -0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"epoch": e, **odd}) + "\n" for e in (2, 1)))
    told = report(run).text
    assert "Training loss" not in told
    assert "0 images/s" in told


def test_what_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    for words, said in (
        ([str(tmp_path / "absent")], "there is no such folder"),
        ([str(tmp_path)], "names no recipe"),
        ([str(tmp_path), str(tmp_path)], "--out FILE.html"),
    ):
        assert cli.main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error


# the judgement --------------------------------------------------------------------------------------------------
def test_levels(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"epochs": 30}))

    def level(**changes: Any) -> tuple[str, str]:
        write(run / "trust-best.json", result(**{"verdicts": verdicts("ok", "ok"), **changes}))
        found = judge(read(run))
        return found.level, " | ".join(reason for _, reason in found.reasons)

    write(run / "evaluation-best.json", result())
    assert level()[0] == "ok"
    assert level(verdicts=verdicts("ok", "doubt"))[0] == "doubt"
    assert "check 1: text 1" in level(verdicts=verdicts("ok", "doubt"))[1]
    assert level(verdicts=verdicts("ok", "note"))[0] == "ok"
    assert "check 1: text 1" in level(verdicts=verdicts("ok", "note"))[1]
    assert level(verdicts=verdicts("ok", "not run")) == (
        "open", f"not run in the trust report: check 1: mwpb-fast trust {run} | "
        "1 of 2 checks of the trust report ok | "
        "the result is of the checkpoint that the run has now, by its SHA-256")  # fmt: skip
    write(run / "evaluation-best.json", result(warnings={"batch": {"message": "logits depend"}}))
    assert level()[1].startswith("warning (batch): logits depend")
    (run / "trust-best.json").unlink()
    write(run / "evaluation-best.json", result(sha256="b" * 64))
    found = judge(read(run))
    assert found.level == "doubt"
    assert "another checkpoint" in found.reasons[0][1]
    write(run / "evaluation-best.json", result(preview=True))
    assert judge(read(run)).level == "open"
    without = result()
    del without["attacks"]["aa"]
    write(run / "evaluation-best.json", without)
    told = f"upper bound, from pgd20: mwpb-fast evaluate {run} --attacks natural,pgd20,aa"
    assert any(told in reason for _, reason in judge(read(run)).reasons)
    write(run / "trust-best.json", result(verdicts=verdicts("ok")))
    next((run / "checkpoints").iterdir()).unlink()
    assert judge(read(run)).reasons[0] == (
        "open", "there is no checkpoint by which to tell whether the result is of this run's")  # fmt: skip
    (run / "trust-best.json").unlink()
    (run / "evaluation-best.json").unlink()
    assert judge(read(run)).level == "none"


def test_the_whole_test_set_goes_before_a_preview_and_autoattack_before_pgd(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    weak = result()
    del weak["attacks"]["aa"]
    write(run / "evaluation-best.json", weak)
    write(run / "trust-best.json", result(verdicts=verdicts("ok")))
    write(run / "trust-best-preview.json", result(preview=True, verdicts=verdicts("ok")))
    found = judge(read(run)).headline
    assert found is not None
    assert found.file == "trust-best.json"


# several runs ----------------------------------------------------------------------------------------------------
def test_paired_differences_by_hand() -> None:
    found = compare.paired("1100", "1011")
    assert (found.points, found.n, found.clear) == (25.0, 4, False)
    # Agresti and Min: (2.5 - 1.5) / 6, and 1.96 * sqrt(4 - 1 / 6) / 6 about it
    assert found.interval == pytest.approx((100 / 6 - 63.957, 100 / 6 + 63.957), abs=1e-2)
    assert compare.paired("0" * 50 + "1" * 50, "1" * 100).clear
    same = compare.paired("10" * 50, "10" * 50)
    assert same.points == 0
    assert same.interval[0] == -same.interval[1] < 0


def test_only_the_same_images_and_radii_are_compared(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / "a", "digits.at"), whole_run(tmp_path / "b")]
    other = result()
    other["attacks"]["pgd20"] = other["attacks"]["pgd20"] | {"eps": "4/255"}
    other["attacks"]["aa"]["flags"] = "1" * 55 + "0" * 45
    write(runs[1] / "evaluation-best.json", other)
    (runs[1] / "trust-best.json").unlink()
    one, two = (judge(read(run)).headline for run in runs)
    assert [d.attack for d in compare.differences(one, two)] == ["natural", "aa", "worst"]
    assert [d.points for d in compare.differences(one, two)] == [0, 5, 0]
    write(runs[1] / "evaluation-best.json", result(data_sha256="e" * 64))
    assert compare.differences(one, judge(read(runs[1])).headline) == []
    assert "there is no paired difference" in report(*runs).text


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / "a", "digits.at"), whole_run(tmp_path / "b"), make_run(tmp_path / "c", epochs=0)]
    out = tmp_path / "new" / "compared.html"
    assert cli.main(["report", *map(str, runs), "--no-images", "--out", str(out)]) == 0
    found = Page(out.read_text(encoding="utf-8"))
    assert "Against digits.at" in found.text
    assert f"digits.mwpb_at ({runs[2]})" in found.text  # two of one recipe
    assert "another seed of training may move a run by more" in found.text
    assert len(set(found.having("id"))) == len(found.having("id"))


# hostile names ---------------------------------------------------------------------------------------------------
def test_names_do_not_become_markup(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "<b>&run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["recipe"] = config["model"]["name"] = config["objective"]["name"] = "<script>alert(1)</script>"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    bad = result(classes=[HOSTILE, "b"], warnings={HOSTILE: {"message": HOSTILE}}, notes=[HOSTILE])
    bad["attacks"][HOSTILE] = bad["attacks"].pop("pgd20") | {"deviations": [HOSTILE], "norm": HOSTILE}
    write(run / "evaluation-best.json", bad)
    write(run / "trust-best.json", bad | {"verdicts": [{"check": HOSTILE, "verdict": "doubt", "text": HOSTILE}]})
    write(run / "engine.json", {"chosen": {"name": HOSTILE}, "why": HOSTILE, "tried": [{"name": HOSTILE}]})
    write(run / "environment.json", {HOSTILE: HOSTILE})
    found = report(run, looked=HOSTILE)
    assert not {"script", "b>"} & {tag for tag, _ in found.elements}
    assert sum(tag == "title" for tag, attributes in found.elements) >= 1
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert found.text.count("<script>alert(1)</script>") > 10


def test_escaping() -> None:
    assert text("a<b>&\"'") == "a&lt;b&gt;&amp;&quot;&#x27;"
    assert text("\u202e\x07\udcff") == "\\u202e\\u0007\\udcff"
    assert element("a", "<", element("b", "c"), href='"', class_="x", aria_label=None) == (
        '<a href="&quot;" class="x">&lt;<b>c</b></a>'
    )


# charts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.7), (1e-9, 2e-9), (3, 3), (0, 1e12), (-5, -4)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    axis = span([low, high], "")
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(axis.low - 1e-9 * abs(low) <= tick <= axis.high * (1 + 1e-9) + 1e-9 for tick in ticks)
    assert Axis("", 0.001, 0.1, log=True).ticks() == pytest.approx([0.001, 0.01, 0.1])
    assert Axis("epoch", 0.5, 3.5, whole=True).ticks() == [1, 2, 3]


def test_cells_of_the_heat_map_hold_all_images() -> None:
    edges = [1.0, 1.0, 1.0, 2.0, 4.0, 4.0, 4.0]
    cells = curves._cells(edges, 0.5)
    assert sum(share for _, _, share in cells) == pytest.approx(1)
    assert cells[0][0] == 1.0
    assert cells[-1][1] == 4.0
    assert curves._cells([3.0] * 7, 0.5) == [(3.0, 3.0, pytest.approx(1))]


def test_what_differs_between_runs(tmp_path: Path) -> None:
    told = report(whole_run(tmp_path / "a", "digits.at"), whole_run(tmp_path / "b")).text
    assert "budget.alpha - 0.58" in told
    assert "optim.lr" not in told
    assert (
        "All runs have the same configuration" in report(make_run(tmp_path / "c"), make_run(tmp_path / "d")).text
    )


def test_long_runs_stay_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=1500)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        record |= {f"radius_{name}": 0.1 + 0.01 * i for i, name in enumerate(curves.QUANTILES)}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert len(page([read(run)], ["left out"])) < 2**19
