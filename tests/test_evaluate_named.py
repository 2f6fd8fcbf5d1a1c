"""Somebody's class and somebody's weights: found by name or file, filled strictly, and errors that help."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import one_thread as one_thread  # an autouse fixture

from mwpb_fast import cli
from mwpb_fast.evaluation.checkpoint import Subject
from mwpb_fast.evaluation.request import Request
from mwpb_fast.models import build_model

CODE = """
import torch
from torch import nn
from their_layers import SIZE

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, classes))
    def forward(self, x):
        return self.body(x)

class Needy(Net):
    def __init__(self, classes):
        super().__init__(classes)

def function(x):
    return x.flatten(1)[:, :10]

torch.manual_seed(0)
truth = Net()
x = torch.rand(40, 3, 4, 4)
pair = (x, truth(x).argmax(1))
"""
OPTIONS = ["--images", "theirs/model.py:pair", "--attacks", "natural", "--device", "cpu"]


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with somebody's code in another, and the weights that its images are labelled by."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "theirs" / "their_layers.py").write_text("SIZE = 48\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("theirs", "theirs.model", "their_layers", "file model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    truth: Any = Subject(Request(Path("theirs/model.py:truth"), images="theirs/model.py:pair")).model
    wrapped = {f"module.{name}": value for name, value in truth.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, "cnn.pth")
    return tmp_path


def evaluate(*words: str) -> int:
    return cli.main(["evaluate", *words, *OPTIONS])


def test_a_class_is_filled_from_a_file(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("theirs/model.py:Net", "--weights", "cnn.pth") == 0
    result = json.loads((theirs / "evaluation-model.Net-cnn.json").read_bytes())
    assert result["attacks"]["natural"]["accuracy"] == 100
    assert result["sha256"] == hashlib.sha256((theirs / "cnn.pth").read_bytes()).hexdigest()
    assert result["weights"] == "weights from state_dict.module, of cnn.pth"
    assert "made" not in result
    assert result["weights"] in capsys.readouterr().out
    assert str(theirs / "theirs") not in sys.path
    (shard,) = (theirs / "evaluation-model.Net-cnn").iterdir()
    content = torch.load("cnn.pth")
    content["state_dict"]["module.body.1.bias"][0] += 1e-6
    torch.save(content, "cnn.pth")
    assert evaluate("theirs/model.py:Net", "--weights", "cnn.pth") == 0
    assert len(list(shard.parent.iterdir())) == 2  # other weights, other shards


def test_a_set_of_several_is_chosen(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = torch.load("cnn.pth")["state_dict"]
    torch.save({"good": good, "bad": {name: value + 1 for name, value in good.items()}}, "two.pth")
    assert evaluate("theirs/model.py:Net", "--weights", "two.pth") == 2
    assert "choose by --weights PLACE, for a model in code by --weights FILE:PLACE" in capsys.readouterr().err
    assert evaluate("theirs/model.py:Net", "--weights", "two.pth:good") == 0
    result = json.loads((theirs / "evaluation-model.Net-two.json").read_bytes())
    assert result["attacks"]["natural"]["accuracy"] == 100


def test_the_files_normalisation_is_left_to_the_code(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither put before a model that may have it already, nor passed over in silence."""
    content = torch.load("cnn.pth")["state_dict"] | {"mu": torch.full((3,), 0.4), "sigma": torch.full((3,), 0.2)}
    torch.save({name.replace("module.", "model."): value for name, value in content.items()}, "statistics.pth")
    assert evaluate("theirs/model.py:Net", "--weights", "statistics.pth") == 1
    assert "normalisation mu, sigma is not applied to a model in code" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("theirs/model.py:function --weights cnn.pth", "--weights fills a module"),
        ("theirs/model.py:Needy", "name a function without arguments that makes the model"),
        ("theirs/model.py:Nett", "there is no attribute 'Nett'; did you mean Net?"),
        ("theirs.model:Nett", "there is no attribute 'Nett'; did you mean Net?"),
        ("theirs.user:net", "named theirs/user.py:net, it finds what lies in its own folder"),
        ("theirs/member.py:net", "is named PACKAGE.MODULE:NAME"),
        ("theirs/modell.py:Net", "theirs/modell.py: there is no such file"),
        ("theirs.modell:Net", "No module named 'theirs.modell' in the current folder or among the installed"),
        ("theirs/model.py:Net --weights theirs/model.py", "theirs/model.py: is code"),
        (
            "theirs/model.py:Net --weights other.pth",
            "into theirs/model.py:Net: weights do not fit the model: missing",
        ),
    ],
)
@pytest.mark.usefixtures("theirs")
def test_what_cannot_be_is_one_line(words: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, "other.pth")
    Path("theirs/user.py").write_text("import their_neighbour\n", encoding="utf-8")
    Path("theirs/member.py").write_text("from .their_layers import SIZE\n", encoding="utf-8")
    assert evaluate(*words.split()) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_a_model_that_was_made_anew_is_said_to_be(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, anew in (("Net", True), ("truth", False), ("function", False)):
        assert evaluate(f"theirs/model.py:{name}") == 0
        said = capsys.readouterr()
        result = json.loads((theirs / f"evaluation-model.{name}.json").read_bytes())
        assert ("made" in result, "NOTE: theirs/model.py:" in said.err) == (anew, anew)
        assert said.out.endswith(f"written: evaluation-model.{name}.json\n")
    assert evaluate("theirs/model.py:Net") == 0  # with weights drawn again, which are no other setting
    assert "kept:" not in capsys.readouterr().out


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("smallresnet-16", num_classes=10, channels=1).state_dict(), "w.pt")
    return tmp_path


def test_a_result_of_other_settings_is_kept(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def attack(attacks: str, *more: str) -> tuple[dict[str, Any], list[str]]:
        words = ["evaluate", "w.pt", "--recipe", "digits.at", "--device", "cpu", "--attacks", attacks, *more]
        assert cli.main(words) == 0
        *_, line, last = capsys.readouterr().out.splitlines()
        result: dict[str, Any] = json.loads(Path(last.removeprefix("written: ")).read_bytes())
        return result, [line] if line.startswith("kept: ") else []

    result, kept = attack("natural", "--subset", "20")
    assert result["model_config"] == {"name": "smallresnet-16", "normalize": False}
    assert (result["normalize"], kept) == (None, [])
    assert attack("natural,pgd2", "--subset", "20")[1] == []  # all that was known, and more
    assert attack("natural,pgd2")[1] == []  # on the whole set
    before = (weights / "evaluation-w.json").read_bytes()
    assert attack("natural", "--subset", "20")[1] == []
    assert (weights / "evaluation-w-preview.json").exists()
    result, (line,) = attack("natural", "--model.normalize", "true")
    assert result["model_config"]["normalize"] is True
    assert len(result["normalize"]) == 2
    assert line.endswith("the new one differs in model, attacks")
    assert Path(line.removeprefix("kept: ").partition(",")[0]).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["w.pt"], "--recipe table1.at --model.name resnet-18, or for code FILE.py:NAME --weights w.pt"),
        (
            ["w.pt", "--recipe", "table1.at", "--data.name", "digits"],
            "FILE.py:NAME --weights w.pt --recipe table1.at",
        ),
        (["net.pt", "--recipe", "digits.at"], "unexpected module.a.weight; are they another"),
        (["model.py"], "as model.py:NAME or MODULE:NAME"),
        (["model.py", "--recipe", "digits.at"], "as model.py:NAME or MODULE:NAME"),
        (["theirs/model:Net"], "code is named MODULE:NAME or FILE.py:NAME"),
    ],
)
def test_files_that_say_too_little(
    words: list[str], reason: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (weights / "model.py").write_text("net = None\n", encoding="utf-8")
    torch.save({"net": {"module.a.weight": torch.zeros(3)}, "optimizer": {"state": {}}}, "net.pt")
    assert cli.main(["evaluate", *words, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
