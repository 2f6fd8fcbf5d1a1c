"""Exported models: each form loads where it is for, computes the model's logits, and says what it is."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import robustbench_stub
import torch
from test_models import randomize_
from torch import nn

from mwpb_fast import cli
from mwpb_fast.config import recipe, to_dict
from mwpb_fast.export import FORMATS
from mwpb_fast.export.formats import ExportError, check
from mwpb_fast.export.source import read_source
from mwpb_fast.models import build_model
from mwpb_fast.runs import checkpoint

STATISTICS = ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
ONNX = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def made(
    folder: Path, name: str = "wrn-10-1", size: int = 32, normalize: object = None, ema: bool = False
) -> nn.Module:
    """A run's folder with one checkpoint, and the model in it."""
    config = recipe("table1.mwpb_at")
    config = replace(config, model=replace(config.model, name=name, normalize=normalize is not None))
    config = replace(config, optim=replace(config.optim, ema=0.9 * ema))
    model = randomize_(build_model(name, num_classes=4, normalize=normalize)).eval()  # type: ignore[arg-type]
    other = randomize_(build_model(name, num_classes=4)).state_dict()
    classes = ["a", "b", "c", "d"]
    data = {"classes": classes, "channels": 3, "height": size, "width": size}
    weights = {"model": other, "ema": model.state_dict()} if ema else {"model": model.state_dict(), "ema": None}
    state = {"config": to_dict(config), "epoch": 3, "normalize": normalize, "data": data, **weights}
    checkpoint.save(folder / "checkpoints", "best", 3, 0, checkpoint.MARK | state)
    return model


def code(card: Path) -> str:
    """The Python of a card, as its reader would run it in the card's folder."""
    (block,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return block


@pytest.fixture
def robustbench(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from robustbench.model_zoo.architectures import resnet` finds the stub."""
    names = ("robustbench", "robustbench.model_zoo", "robustbench.model_zoo.architectures")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("resnet", "wide_resnet", "dm_wide_resnet"):
        monkeypatch.setattr(sys.modules[names[-1]], name, robustbench_stub, raising=False)


@pytest.mark.parametrize(
    ("name", "normalize"),
    [
        ("resnet-18", STATISTICS),
        ("preactresnet-18", None),
        ("wrn-10-1", None),
        ("wrn-16-2", STATISTICS),
        ("wrnsilu-10-1", None),
        ("wrnsilu-16-2", STATISTICS),
    ],
)
def test_robustbench_loads_its_form_strictly(
    name: str, normalize: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, robustbench: None
) -> None:
    model = made(tmp_path, name, normalize=normalize)
    assert cli.main(["export", str(tmp_path), "--format", "robustbench"]) == 0
    monkeypatch.chdir(tmp_path / "export-robustbench")
    space: dict[str, object] = {}
    exec(code(Path("README.md")), space)
    theirs = space["model"]
    assert isinstance(theirs, nn.Module)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x))


@pytest.mark.parametrize("ema", [False, True], ids=["last weights", "averaged"])
def test_safetensors_hold_the_weights_that_are_evaluated(
    ema: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(tmp_path, normalize=STATISTICS, ema=ema)
    file = next((tmp_path / "checkpoints").glob("*.pt"))
    out = ["--out", str(tmp_path / "a" / "m.safetensors")]
    assert cli.main(["export", str(file), "--format", "safetensors", *out]) == 0
    monkeypatch.chdir(tmp_path / "a")
    space: dict[str, object] = {}
    exec(code(Path("README.md")), space)
    loaded = space["model"]
    assert isinstance(loaded, nn.Module)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert {path.name for path in Path().iterdir()} == {"README.md", "m.safetensors"}
    text = Path("README.md").read_text()
    assert ("averaged" in text) is ema
    assert "mean [0.49, 0.48, 0.45]" in text


@pytest.mark.parametrize("form", ["torch-export", pytest.param("onnx", marks=pytest.mark.skipif(
    bool(ONNX), reason=f"not installed: {', '.join(ONNX)} (the extra `export`)"))])  # fmt: skip
def test_programs_take_any_batch(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = made(tmp_path, "smallresnet-4", size=8, normalize=STATISTICS)
    assert cli.main(["export", str(tmp_path), "--format", form]) == 0
    assert capfd.readouterr().err == ""  # PyTorch's exporters have much to say
    monkeypatch.chdir(tmp_path / f"export-{form}")
    assert {path.name for path in Path().iterdir()} == {"README.md", f"model{FORMATS[form]}"}
    for count in (1, 7):
        x = torch.rand(count, 3, 8, 8)
        space: dict[str, object] = {"x": x.numpy()}
        exec(code(Path("README.md")), space)
        with torch.no_grad():
            found = space["model"](x) if "model" in space else torch.from_numpy(space["logits"])  # type: ignore
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_without_the_packages_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert cli.main(["export", str(tmp_path), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs onnx, which" in error
    assert not (tmp_path / "export-onnx").exists()


def test_the_card_has_results_of_this_checkpoint_alone(tmp_path: Path) -> None:
    made(tmp_path)
    source = read_source(tmp_path, "best")
    entry = {"accuracy": 51.25, "interval": [50.0, 52.5], "norm": "linf", "eps": "8/255"}
    result = {"sha256": source.sha256, "n": 10000, "preview": False, "attacks": {"aa": entry}, "warnings": {}}
    verdict = {"check": "more steps", "verdict": "ok", "text": "no stronger"}
    (tmp_path / "evaluation-best.json").write_text(json.dumps(result))
    (tmp_path / "trust-best.json").write_text(json.dumps(result | {"verdicts": [verdict]}))
    words = ["export", str(tmp_path), "--format", "safetensors"]
    assert cli.main(words) == 0
    card = tmp_path / "export-safetensors" / "README.md"
    for line in ("| aa | 51.25 % | 50.00 to 52.50 | linf 8/255 |", "- ok: more steps: no stronger"):
        assert line in card.read_text().splitlines()
    assert re.search(r"radius.*8/255", card.read_text())
    assert card.read_text().count("# table1.mwpb_at, changed\n") == 1
    assert "| changed from it | model.name wrn-10-1 instead of resnet-18 |" in card.read_text()
    assert "## Licence" in card.read_text()
    for name in ("evaluation-best.json", "trust-best.json"):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | {"sha256": "0" * 64}))
    assert cli.main(words) == 0
    assert "51.25" not in card.read_text()
    assert "not evaluated" in card.read_text()
    card.write_text("# Mine\n")
    assert cli.main(words) == 2
    assert card.read_text() == "# Mine\n"


def test_what_is_wrong_is_refused_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "smallresnet-4", size=8)
    for words, reason in (
        (["--format", "robustbench"], "RobustBench has no class for smallresnet-4"),
        (["--format", "robustbench", "--out", "a.safetensors"], "a file of robustbench ends in .pt"),
        (["--format", "onnx", "--which", "last"], "no last checkpoint"),
    ):
        assert cli.main(["export", str(tmp_path), *words]) == 2, words
        assert reason in capsys.readouterr().err
    made(tmp_path, size=8)
    assert cli.main(["export", str(tmp_path), "--format", "robustbench"]) == 2
    assert "take images of 3x32x32, not of 3x8x8" in capsys.readouterr().err
    weights = tmp_path / "weights.pt"
    torch.save(build_model("wrn-10-1", num_classes=4).state_dict(), weights)
    assert cli.main(["export", str(weights), "--format", "safetensors"]) == 2
    assert "holds weights only" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "weights.pt"}


def test_what_computes_something_else_is_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made(tmp_path)
    source = read_source(tmp_path, "best")
    check(source, model)
    with pytest.raises(ExportError, match="off by"):
        check(source, lambda x: model(x) + 1e-3)
    with pytest.raises(ExportError, match="off by"):
        check(source, lambda x: model(x) * float("nan"))
    monkeypatch.setattr("mwpb_fast.export.formats.check", lambda *rest: check(source, lambda x: 2 * model(x)))
    assert cli.main(["export", str(tmp_path), "--format", "safetensors"]) == 1
    assert capsys.readouterr().err.startswith("mwpb-fast: error: what was written is off by")
    assert list((tmp_path / "export-safetensors").iterdir()) == []
