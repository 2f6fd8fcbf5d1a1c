"""`mwpb-fast train` from end to end: what it refuses before it trains, and what it attacks afterwards."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest
import torch

from mwpb_fast import cli
from mwpb_fast.data.dataset import Config, Images
from mwpb_fast.evaluation import checkpoint
from mwpb_fast.evaluation.request import Request
from mwpb_fast.runs.view import View

TINY = [
    "digits.mwpb_at", "--data.subset", "128", "--epochs", "2", "--warmup_epochs", "1", "--precision.device", "cpu",
    "--optim.drops", "[]", "--model.name", "smallresnet-8", "--attack.steps", "2", "--quiet",
]  # fmt: skip
NATURAL = ["--evaluation.attacks", "natural", "--evaluation.subset", "40"]


def train(folder: Path, *words: str) -> int:
    return cli.main(["train", *TINY, *words, "--out", str(folder)])


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("mwpb-fast: error: ")
    assert text.count("\n") == 1
    return text


def attacked(folder: Path) -> dict[str, object]:
    return json.loads((folder / "evaluation-best.json").read_text())


def test_the_commands_evaluation_is_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the best checkpoint is of an earlier command with other attacks, data folder and device."""
    assert train(tmp_path, *NATURAL) == 0
    assert attacked(tmp_path)["attacks"].keys() == {"natural"}  # type: ignore[attr-defined]
    seen = []

    def evaluate_run(request: Request) -> dict[str, object]:
        seen.append(request)
        return real(request)

    real = checkpoint.evaluate_run
    monkeypatch.setattr(checkpoint, "evaluate_run", evaluate_run)
    moved = ["--evaluation.attacks", "natural,pgd2", "--data.dir", str(tmp_path), "--precision.device", "auto"]
    assert train(tmp_path, *NATURAL, *moved) == 0
    assert attacked(tmp_path)["attacks"].keys() == {"natural", "pgd2"}  # type: ignore[attr-defined]
    assert (seen[0].data_dir, seen[0].device) == (str(tmp_path), "auto")


def test_a_long_attack_ahead_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "evaluate_run", lambda request: {})
    monkeypatch.setattr(View, "result", lambda *words: None)
    for words in ((), ("--evaluation.attacks", "natural,spsa2,aa"), ("--quiet", "--evaluation.attacks", "aa")):
        told = [word for word in TINY if word != "--quiet"]
        assert cli.main(["train", *told, *NATURAL, *words, "--out", str(tmp_path / "a run")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "--no-evaluate" in line]
    assert told == [
        "mwpb-fast: spsa2, aa may take longer than the training; it can be stopped, and mwpb-fast evaluate "
        f"'{tmp_path}/a run' goes on; train --no-evaluate leaves it for later"
    ]


def test_attack_whose_package_is_missing_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert train(tmp_path / "run", "--evaluation.attacks", "natural,aa") == 2
    assert "need pyautoattack, which is not installed: pip install 'mwpb-fast[eval]'" in one_error_line(capsys)
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", "--evaluation.attacks", "natural,aa", "--no-evaluate") == 0


def test_attack_that_needs_more_classes_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def two_classes(config: Config, split: str) -> Images:
        images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
        return Images(images, torch.arange(40) % 2, ("cat", "dog"))

    monkeypatch.setattr("mwpb_fast.data.load_split", two_classes)
    assert train(tmp_path / "run", "--evaluation.attacks", "natural,apgd-t") == 2
    assert "needs at least 4 classes, the model has 2" in one_error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_full_disk_at_a_checkpoint_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mwpb_fast.runs.checkpoint.write_atomically", full)
    assert train(tmp_path, "--no-evaluate") == 1
    assert "cannot be written: No space left on device" in one_error_line(capsys)
