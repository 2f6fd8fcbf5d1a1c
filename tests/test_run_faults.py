"""What runs meet: bad steps, damaged records, models of one's own, states that do not fit, leftovers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import tiny

from mwpb_fast import cli, train
from mwpb_fast.config import ConfigError, EvaluationConfig
from mwpb_fast.data.dataset import DataError, Images
from mwpb_fast.engine.precision import Precision
from mwpb_fast.evaluation.evaluate import evaluate
from mwpb_fast.reproduce.gather import _number
from mwpb_fast.runs.log import parse_records, read_records
from mwpb_fast.runs.plots import read_run
from mwpb_fast.runs.writer import Writer
from mwpb_fast.system.files import to_json

WORDS = ["train", "digits.mwpb_at", "--data.subset=64", "--data.batch_size=16", "--model.name=smallresnet-4",
         "--warmup_epochs=0", "--optim.drops=[]", "--attack.steps=1", "--no-evaluate", "--quiet"]  # fmt: skip


def strict(path: Path) -> list[Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# numbers that are none -------------------------------------------------------------------------------------------
def test_json_has_no_nan() -> None:
    content = {"a": math.nan, "b": [math.inf, -math.inf, 1.5, (2,)], "c": {"d": "NaN", "e": True, 3: None}}
    assert to_json(content) == '{"a": null, "b": [null, null, 1.5, [2]], "c": {"d": "NaN", "e": true, "3": null}}'


def test_a_bad_step_is_in_no_statistic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its radius is not a number either: the epoch's figures are those of the other steps."""
    real = train.Step.__call__
    calls = 0

    def second_is_bad(self: Any, *words: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(self, *words)
        if calls != 2:
            return result
        nothing = torch.full_like(result.radius, math.nan)
        return result._replace(loss=result.loss * math.nan, radius=nothing, finite=torch.tensor(False))

    monkeypatch.setattr(train.Step, "__call__", second_is_bad)
    record = train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    assert record["bad_batches"] == [1]
    assert record["radius_min"] == record["radius_mean"] == record["radius_max"] == pytest.approx(16 / 255)
    assert strict(tmp_path / "metrics.jsonl") == [record]


def test_readers_take_the_nan_of_earlier_versions_and_null(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    (good,) = read_records(tmp_path / "metrics.jsonl")
    lines = [good, good | {"epoch": 2, "radius_mean": math.nan}, good | {"epoch": 3, "radius_mean": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    radii = json.loads((tmp_path / "radii.json").read_text())
    radii["radii"][:2] = [math.nan, None]
    (tmp_path / "radii.json").write_text(json.dumps(radii))
    run = read_run(tmp_path)
    assert run.radii_columns()[0] == [1]
    assert len(run.radii) == 198
    assert all(map(math.isfinite, run.radii))
    assert [_number(value) for value in (1.5, 2, None, math.nan, "x")] == [1.5, 2, None, None, None]


# records ---------------------------------------------------------------------------------------------------------
def test_damaged_records_are_named_and_kept_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.run(tiny("--epochs=1", "--warmup_epochs=0"), tmp_path, quiet=True)
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes()
    bad = [b"{half", b"3", b'{"loss": 1}', b"\xff\xfe", b'{"epoch": "1"}']
    path.write_bytes(b"\n".join(bad) + b"\n\n" + good + b'{"epoch": 2, "lo')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: .*line 1 is no record"):
        read_run(tmp_path)
    assert [r["epoch"] for r in read_records(path)] == [1]
    train.run(tiny("--epochs=2", "--warmup_epochs=0"), tmp_path, quiet=True)
    assert [r["epoch"] for r in strict(path)] == [1, 2]
    assert (tmp_path / "metrics-damaged.jsonl").read_bytes().splitlines() == bad
    err = capsys.readouterr().err
    assert f"{path}: no record in line 1, 2, 3, 4, 5; kept in metrics-damaged.jsonl" in err
    assert parse_records(path)[1] == {}


def test_points_of_an_epoch_that_is_done_again_are_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between an epoch's record and its checkpoint."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "begin", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    train.run(tiny("--epochs=2"), tmp_path, quiet=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("loss")] == [1, 2]
    assert [record["epoch"] for record in strict(tmp_path / "metrics.jsonl")] == [1, 2]


def test_tensorboard_that_fails_costs_its_points_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard.writer")

    def broken(*words: Any, **more: Any) -> None:
        raise OSError("no room\nfor points")

    monkeypatch.setattr(writer.SummaryWriter, "add_scalar", broken)
    assert train.run(tiny("--epochs=2"), tmp_path, quiet=True)["epoch"] == 2
    assert capsys.readouterr().err == "mwpb-fast: no more points for TensorBoard: no room for points\n"


# models of one's own ---------------------------------------------------------------------------------------------
MODEL = """
import torch

class Model(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(64, classes), torch.nn.BatchNorm1d(classes)

    def forward(self, x):
        logits = self.norm(self.linear(x.flatten(1)))
        return {result}

def build(*, num_classes, channels):
    {before}
    return Model({classes})
"""


def model(folder: Path, patch: pytest.MonkeyPatch, **parts: str) -> str:
    """The option that takes a model from outside, made of these parts."""
    package = folder / "outside_model"
    package.mkdir()
    text = MODEL
    for name, default in {"result": "logits", "before": "pass", "classes": "num_classes"}.items():
        text = text.replace(f"{{{name}}}", parts.get(name, default))
    (package / "mine.py").write_text(text)
    patch.syspath_prepend(folder)
    for module in ("outside_model", "outside_model.mine"):
        patch.delitem(sys.modules, module, raising=False)
    return "--model.name=outside_model.mine"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"result": "(logits, x)"}, "it returns a tuple, not a tensor of logits"),
        (
            {"result": "logits[:, :, None, None]"},
            "returns torch.float32 (2, 10, 1, 1), not floating logits (2, 10)",
        ),
        ({"result": "logits.argmax(1)"}, "it returns torch.int64 (2,), not floating logits"),
        ({"result": "logits.detach()"}, "its logits have no gradient"),
        ({"classes": "5"}, "it gives logits for 5 classes, the data set has 10"),
        ({"result": "logits.nothing"}, "'Tensor' object has no attribute 'nothing'"),
        ({"before": "num_classes.x"}, "'int' object has no attribute 'x'"),
        ({"before": "import absent_module"}, "No module named 'absent_module'"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused_in_one_line(
    parts: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = model(tmp_path, monkeypatch, **parts)
    assert cli.main([*WORDS, option, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mwpb-fast: error: model.name: outside_model.mine")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_that_gives_no_logits_is_not_evaluated() -> None:
    images = (torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))

    class Pair(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, x

    precision = Precision(torch.device("cpu"), torch.float32, torch.contiguous_format, oracle=False)
    with pytest.raises(ConfigError, match="cannot be evaluated: it returns a tuple"):
        evaluate(Pair().eval(), images, EvaluationConfig(attacks=("natural",)), precision, show=False)


def test_trying_a_model_leaves_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(model(tmp_path, monkeypatch), "--precision.engine=eager")
    tried = train.Trainer(config, tmp_path / "a", None, quiet=True)  # type: ignore[arg-type]
    monkeypatch.setattr("mwpb_fast.engine.build.try_model", lambda *words: None)
    untried = train.Trainer(config, tmp_path / "b", None, quiet=True)  # type: ignore[arg-type]
    one, other = tried.state(), untried.state()
    assert all(torch.equal(one["model"][name], value) for name, value in other["model"].items())
    assert torch.equal(one["random"]["cpu"], other["random"]["cpu"])


@pytest.mark.parametrize("batch", ["--data.batch_size=63", "--data.batch_size=1"])
def test_a_batch_of_one_under_batch_norm_is_refused_before_training(
    batch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--epochs=1", batch, "--data.last_batch=keep", "--out", str(tmp_path / "run")]
    assert cli.main([*words, model(tmp_path, monkeypatch)]) == 2
    assert "on a batch of one image, and there is one: Expected more than 1 value" in capsys.readouterr().err
    if batch.endswith("63"):  # its feature maps have more than one pixel, so that its norms have more values
        assert cli.main(words) == 0


def test_a_set_of_one_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64), ("cat",), "x")
    monkeypatch.setattr("mwpb_fast.data.load_split", lambda config, split: images)
    with pytest.raises(DataError, match="x: has fewer than two classes"):
        train.run(tiny("--data.batch_size=8", "--data.subset=20"), tmp_path, quiet=True)


def test_a_folder_of_one_class_is_not_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / "solo" / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "solo" / split / "a" / "0.png")
    words = ["data", "prepare", "folder", "--from", str(tmp_path / "solo"), "--dir", str(tmp_path / "data")]
    assert cli.main(words) == 2
    assert "solo: has one class, a; there is nothing to tell it from" in capsys.readouterr().err
