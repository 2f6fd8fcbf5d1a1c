"""Any function and any images: from Python as docs/evaluate.md has it, and by name from the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import config, flags_of, labelled, linear, one_line
from evaluate_cases import one_thread as one_thread  # an autouse fixture
from torch.utils.data import DataLoader, TensorDataset

from mwpb_fast import cli
from mwpb_fast.config import ConfigError
from mwpb_fast.evaluation.checkpoint import Subject
from mwpb_fast.evaluation.evaluate import evaluate
from mwpb_fast.evaluation.named import is_name
from mwpb_fast.evaluation.request import Request

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evaluate.md"
CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.head = nn.Linear(48, classes)
    def forward(self, x):
        return self.head(x.flatten(1))

def made():
    torch.manual_seed(0)
    return Net()

net = made()
def function(x):
    return net(x)
def wrapper(*arguments):
    return net(*arguments)
def broken():
    raise RuntimeError("no such\\nfile")
x = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(1))
pair = (x, net(x).argmax(1))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), batch_size=16)
number = 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_nets.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "their_nets", raising=False)
    return tmp_path


# from Python ----------------------------------------------------------------------------------------------------


def test_the_page_runs_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    shared: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "evaluate.md", "exec", dont_inherit=True), shared)
    assert shared["result"]["attacks"]["natural"]["accuracy"] == 100
    assert "pgd20" in capsys.readouterr().out


def test_a_loader_gives_what_its_tensors_give() -> None:
    model, settings = linear(), config("natural", "pgd5")
    x, y = labelled(model)
    pair = evaluate(model, (x, y), settings, show=False)
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    result = evaluate(model, loader, settings, show=False)
    assert flags_of(result) == flags_of(pair)
    assert result["data_sha256"] == pair["data_sha256"]
    assert result["notes"] == pair["notes"]
    batches = evaluate(model, [(x[:30], y[:30]), (x[30:], y[30:])], settings, show=False)
    assert flags_of(batches) == flags_of(pair)


def test_what_a_loader_leaves_out_is_said() -> None:
    model = linear()
    loader = DataLoader(TensorDataset(*labelled(model)), batch_size=16, drop_last=True)
    result = evaluate(model, loader, config("natural"), show=False)
    assert result["notes"] == ["the loader gave 32 images, its data set has 40"]


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (3, "a loader of batches"),
        (torch.rand(8, 3, 4, 4), "a loader of batches"),
        ([], "gave no batch"),
        (TensorDataset(torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64)), "DataLoader"),
        ([{"x": torch.rand(8, 3, 4, 4)}], "gave dict"),
        ([(torch.rand(8, 3, 4, 4), torch.zeros(7, dtype=torch.int64))], "8 images and 7 labels"),
        ([(torch.rand(2, 3, n, n), torch.zeros(2, dtype=torch.int64)) for n in (4, 5)], "of one size"),
    ],
)
def test_what_gives_no_images_is_refused(images: Any, reason: str) -> None:
    assert reason in one_line(lambda: evaluate(linear(), images, config("natural"), show=False))


# by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["net", "made", "Net", "function", "wrapper"])
def test_a_model_in_code_is_evaluated(code: Path, target: str) -> None:
    words = ["--images", "their_nets:loader", "--attacks", "natural,pgd5", "--batch-size", "13", "--device", "cpu"]
    assert cli.main(["evaluate", f"their_nets:{target}", *words]) == 0
    result = json.loads((code / f"evaluation-their_nets.{target}.json").read_bytes())
    assert (result["model"], result["n"], result["batch_size"]) == (f"their_nets:{target}", 40, 13)
    if target != "Net":  # which draws new weights
        assert result["attacks"]["natural"]["accuracy"] == 100


@pytest.mark.usefixtures("code")
def test_images_are_a_recipes_where_none_are_named() -> None:
    words = "evaluate their_nets:net --recipe digits.at --attacks natural --device cpu --subset 50"
    assert cli.main(words.split()) == 2
    with pytest.raises(ConfigError, match="--images module:name, or --recipe"):
        Subject(Request(Path("their_nets:net")))
    sys.modules["their_nets"].net = torch.nn.Sequential(  # type: ignore[attr-defined]
        torch.nn.Flatten(), torch.nn.Linear(64, 10)
    )
    assert cli.main(words.split()) == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("their_nets:nothing --images their_nets:pair", "no attribute 'nothing'"),
        ("no_such_module:net --images their_nets:pair", "No module named"),
        ("their_nets:number --images their_nets:pair", "cannot be called with images"),
        ("their_nets:broken --images their_nets:pair", "no such file"),
        ("their_nets:net --images their_nets:number", "a loader of batches"),
        ("their_nets:net --images pair", "pair is no MODULE:NAME"),
        ("their_nets:net --images their_nets:pair --which last", "--which is for files"),
        ("their_nets:net --images their_nets:pair --weights x", "cannot read checkpoint x"),
        ("their_nets:net --recipe digits.at --model.name resnet-18", "their_nets:net is the model"),
        (". --images their_nets:pair", "--images is for a model in code"),
        ("their_nets:net --images their_nets:pair --batch-size 0", "at least 1"),
    ],
)
@pytest.mark.usefixtures("code")
def test_what_cannot_be_is_one_line(words: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", *words.split()]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_names_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(is_name, ("a:b", "a.b:C.d", "é.b:c")))
    assert not any(map(is_name, ("a", "a.pt", "a:", ":b", "a/b:c", "C:\\x", "a:b:c", "a:1")))
    monkeypatch.chdir(tmp_path)
    Path("a:b").touch()
    assert not is_name("a:b")
