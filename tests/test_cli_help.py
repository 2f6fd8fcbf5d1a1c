"""What the command line shows: help, lists, the doctor."""

from __future__ import annotations

import json
import pydoc
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mwpb_fast
from mwpb_fast import cli
from mwpb_fast.choice import cache
from mwpb_fast.choice.candidates import Candidate
from mwpb_fast.choice.record import Record
from mwpb_fast.cli import commands, doctor
from mwpb_fast.config import all_recipes
from mwpb_fast.evaluation import catalog
from mwpb_fast.system.optional import Attempt


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: mwpb-fast {command}")
    assert err == ""
    assert cli.main(["--help"]) == 0
    assert f"\n  {command} " in capsys.readouterr().out


def test_help_of_a_recipe_lists_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "table1.mwpb_trades", "--help", "--budget.alpha", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "--budget.alpha 0.3\n" in out
    assert "--objective.beta 6.0\n" in out
    assert "--budget.eps 8/255\n" in out


def test_help_of_the_package_names_what_there_is() -> None:
    """Every name that `help(mwpb_fast)` gives, with the module that it stands behind."""
    text = mwpb_fast.__doc__ or ""
    dotted = re.findall(r"`(mwpb_fast(?:\.\w+)+)", text)
    assert len(dotted) >= 8
    for name in dotted:
        assert pydoc.locate(name) is not None, name
    for name in ("data.load_split", "data.make_loader", "models.load_weights", "attacks", "objectives"):
        assert name.rpartition(".")[2] in text
        assert pydoc.locate(f"mwpb_fast.{name}") is not None


def test_the_help_of_evaluate_names_every_attack(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--help"]) == 0
    words = set(re.findall(r"[\w@/-]+", capsys.readouterr().out))
    assert {*catalog.NAMED, *(name.replace("-", "20-") for name in catalog.VARIANTS), "pgd20", "cw20"} <= words


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"mwpb-fast \d+\.\d+.*\n", capsys.readouterr().out)


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == all_recipes()


def test_data_list_says_what_is_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (
        ("cifar10", '{"splits": {"train": {"count": 50000}, "test": {"count": 10000}}}'),
        ("svhn", "{"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(content)
    assert cli.main(["data", "list", "--dir", str(tmp_path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "50,000 + 10,000 images" in lines["cifar10"]
    assert "damaged" in lines["svhn"]
    assert "not prepared" in lines["tinyimagenet"]
    assert "embedded" in lines["digits"]


def test_data_prepare_of_the_embedded_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "prepare", "digits"]) == 0
    assert capsys.readouterr().out == "digits: 1,438 train and 359 test images of 10 classes, embedded\n"


def test_data_prepare_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for label, grey in (("cat", 10), ("dog", 200)):
            (tmp_path / "mine" / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8), (grey, grey, grey)).save(tmp_path / "mine" / split / label / "a.png")
    words = ["data", "prepare", "folder", "--data-dir", str(tmp_path / "mine"), "--dir", str(tmp_path / "data")]
    assert cli.main(words) == 0
    place = tmp_path / "data" / "folder"
    assert capsys.readouterr().out == f"folder: 2 train and 2 test images of 2 classes, in {place}\n"
    assert (tmp_path / "data" / "folder" / "train.safetensors").exists()


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"findings", "ops"}
    names = {finding["name"] for finding in report["findings"]}
    assert {"python", "torch", "cpu", "native ops", "triton", "dali", "pyautoattack", "apex"} <= names
    for finding in report["findings"]:
        assert finding["name"] in text
        assert finding["status"] in ("ok", "missing", "optional", "broken", "note")
        assert finding["cost"] or finding["status"] not in ("missing", "optional", "broken")
    import mwpb_kernels as ops

    assert report["ops"]["margin"] == {d: ops.implementation("margin", d) for d in ("cpu", "cuda")}
    assert set(report["ops"]) == set(ops.OPS)
    rows = text.splitlines()
    (line,) = [row for row in rows if row.startswith("ops: ")]
    assert f" of {len(ops.OPS)} are " in line or f"all {len(ops.OPS)} are " in line
    assert len(rows) - rows.index(line) - 1 < len(ops.OPS)


def test_doctor_has_rows_of_the_ops_that_differ() -> None:
    ops = {name: {"cpu": "native", "cuda": "triton"} for name in ("a", "b", "c")}
    assert doctor._of_ops(ops) == ["ops: all 3 are native on the CPU and triton on CUDA"]
    ops["b"] = {"cpu": "reference", "cuda": "triton"}
    line, _, _, row = doctor._of_ops(ops)
    assert line == "ops: 2 of 3 are native on the CPU and triton on CUDA, the others (reference is plain PyTorch):"
    assert row.split() == ["b", "reference", "triton"]


def test_doctor_shows_the_choices_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path))
    assert [f.detail for f in doctor.choices()] == [f"0 choices in {tmp_path / 'engine'}"]
    about = {"model": {"name": "resnet-18"}, "images": [128, 3, 32, 32], "device": "A processor"}
    cache.write(Record(Candidate("twin", "bf16"), "trial", "why", circumstances=about))
    (tmp_path / "engine" / "damaged.json").write_text("{")
    found = [f.detail for f in doctor.choices()]
    assert found[0].startswith("1 choice in ")
    assert found[1] == "twin bf16 for resnet-18 on batches [128, 3, 32, 32], A processor"


def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    monkeypatch.setattr(doctor, "attempt", lambda *names: Attempt(None, "is not installed"))
    found = {finding.name: finding for finding in doctor.packages()}
    assert {found[name].status for name in ("pyautoattack", "matplotlib", "dali", "cudnn", "apex")} == {"optional"}
    assert {found[name].status for name in ("tensorboard", "scikit-learn")} == {"missing"}
    assert "mwpb-fast[eval]" in found["pyautoattack"].cost
    assert "mwpb-fast[plots]" in found["matplotlib"].cost
    assert "mwpb-fast[dali" in found["dali"].cost
    assert "mwpb-fast[cudnn]" in found["cudnn"].cost
    names = ("pyautoattack", "matplotlib", "dali", "cudnn", "apex")
    assert {found[name].detail for name in names} == {"not installed"}


def test_doctor_tells_cudnn_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front end imports where the library itself is missing, and is of no use there."""

    def fails() -> int:
        raise RuntimeError("Unable to find\n symbol")

    monkeypatch.setattr(doctor, "version_of", lambda package: "1.2")
    for version, status, detail in (
        (lambda: 91300, "ok", "1.2 (nvidia-cudnn-frontend), of cuDNN 91300"),
        (fails, "broken", "1.2 finds no cuDNN (Unable to find symbol)"),
        (None, "broken", "1.2 finds no cuDNN ('NoneType' object is not callable)"),
    ):
        module: Any = SimpleNamespace(backend_version=version)
        monkeypatch.setattr(doctor, "attempt", lambda name, found=module: Attempt(found))
        finding = doctor._cudnn()
        assert (finding.status, finding.detail) == (status, detail)
        assert ("CUDA build of PyTorch" in finding.cost) == (status == "broken")
