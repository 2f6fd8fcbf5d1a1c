"""Runs and checkpoints as the command line evaluates them: which weights, which configuration, which processes."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    EPS,
    config,
    evaluated,
    flags_of,
    one_thread,  # noqa: F401  # an autouse fixture
    short,  # noqa: F401  # a fixture
    untrained_state,
)

from mwpb_fast import cli, data, train
from mwpb_fast.config import ConfigError, EvaluationConfig, PrecisionConfig, recipe, resolve, to_dict
from mwpb_fast.data import Config, load_split
from mwpb_fast.engine import precision
from mwpb_fast.evaluation.checkpoint import help_parent
from mwpb_fast.evaluation.request import Request
from mwpb_fast.runs import checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a best and a last checkpoint of an untrained model, the latter with averaged weights."""
    state = untrained_state()
    zeros = {name: torch.zeros_like(value) for name, value in state["model"].items()}
    checkpoint.save(tmp_path / "checkpoints", "best", 3, 0, state)
    checkpoint.save(tmp_path / "checkpoints", "last", 4, 7, state | {"model": zeros, "ema": state["model"]})
    return tmp_path


def test_run_folder_is_evaluated(folder: Path) -> None:
    best = evaluated(folder, config("natural", "pgd2", subset=50))
    assert json.loads((folder / "evaluation-best.json").read_text()) == best
    assert (best["recipe"], best["epoch"], best["which"]) == ("digits.mwpb_at", 3, "best")
    assert best["checkpoint"] == "best-00003-0000000.pt"
    assert best["sha256"] in (folder / "checkpoints" / "best-00003-0000000.pt.sha256").read_text()
    last = evaluated(folder, config("natural", "pgd2", subset=50), which="last")
    assert last["checkpoint"] == "last-00004-0000007.pt"
    assert last["attacks"]["natural"]["flags"] == best["attacks"]["natural"]["flags"]  # the averaged weights
    file = folder / "checkpoints" / "best-00003-0000000.pt"
    single = evaluated(file, config("natural", "pgd2", subset=50))
    assert flags_of(single) == flags_of(best)
    assert (file.parent / "evaluation-best-00003-0000000.json").exists()


def test_bare_weights_need_a_configuration(folder: Path) -> None:
    state = checkpoint.read(folder / "checkpoints" / "best-00003-0000000.pt")
    torch.save({"state_dict": state["model"]}, folder / "weights.pt")
    with pytest.raises(checkpoint.CheckpointError, match="which model"):
        evaluated(folder / "weights.pt", config("natural"))
    given = recipe("digits.mwpb_at")
    bare = evaluated(folder / "weights.pt", config("natural"), config=given)
    assert flags_of(bare) == flags_of(evaluated(folder, config("natural")))
    assert bare["n"] == len(load_split(Config(name="digits"), "test"))


def test_missing_and_foreign_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="no best checkpoint"):
        evaluated(tmp_path / "checkpoints", config("natural"))
    with pytest.raises(checkpoint.CheckpointError, match=r"nowhere\.pt"):
        evaluated(tmp_path / "nowhere.pt", config("natural"))
    (folder / "junk.pt").write_bytes(b"junk")
    with pytest.raises(checkpoint.CheckpointError, match=r"junk\.pt"):
        evaluated(folder / "junk.pt", config("natural"))
    with pytest.raises(ConfigError, match="no attack"):
        evaluated(folder, config("nope"))


@pytest.mark.usefixtures("short")
def test_helper_does_its_part_and_leaves_when_orphaned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = EvaluationConfig(attacks=("natural", "aa"), eps=Fraction(1))
    share = pickle.dumps((Request(folder, asked, config=recipe("digits.mwpb_at")), 1, 2)).hex()
    monkeypatch.setattr(sys, "argv", ["-c", share, str(os.getppid() + 1)])
    with pytest.raises(SystemExit):
        help_parent()
    assert not (folder / "evaluation-best").exists()
    monkeypatch.setattr(sys, "argv", ["-c", share, str(os.getppid())])
    help_parent()
    (name,) = [path.name for path in (folder / "evaluation-best").iterdir()]
    assert name.startswith("aa-")
    assert name.endswith("-00001.json")


def test_processes_share_the_work_and_the_flags_are_the_same(folder: Path) -> None:
    # an untrained model: few images are right and fewer survive, so that the whole attack is short
    settings = EvaluationConfig(attacks=("aa",), eps=Fraction(1), step_size=EPS)
    shared = evaluated(folder, settings, processes=2)
    files = {p.name: p.read_text() for p in (folder / "evaluation-best").iterdir()}
    assert len(files) == 2
    for path in (folder / "evaluation-best").iterdir():
        path.unlink()
    alone = evaluated(folder, settings, processes=1)
    assert flags_of(shared) == flags_of(alone)


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint holds; its sidecar is made anew."""
    state = checkpoint.read(file)
    change(state)
    kind, epoch, batch = file.stem.split("-")
    checkpoint.save(file.parent, kind, int(epoch), int(batch), state)


def test_epoch_is_that_which_the_weights_are_from(tmp_path: Path) -> None:
    words = ["--epochs=2", "--data.subset=200", "--model.name=smallresnet-8", "--attack.steps=2"]
    train.run(resolve(recipe("digits.mwpb_at"), [], [*words, "--precision.device=cpu"]), tmp_path, quiet=True)
    best = evaluated(tmp_path, config("natural", subset=20))
    last = evaluated(tmp_path, config("natural", subset=20), which="last")
    assert f"best-{best['epoch']:05d}-" in best["checkpoint"]
    assert (last["checkpoint"], last["epoch"]) == ("last-00003-0000000.pt", 2)
    # within an epoch the weights are that epoch's already
    (file,) = (tmp_path / "checkpoints").glob("last-00003-*.pt")
    rewrite(file, lambda state: state.update(batch=1))
    assert evaluated(file, config("natural", subset=20))["epoch"] == 3


def test_what_is_given_replaces_what_the_checkpoint_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe("digits.mwpb_at")
    elsewhere = replace(
        settings,
        data=replace(settings.data, dir="/gone"),
        precision=PrecisionConfig(device="cuda:63"),
        evaluation=EvaluationConfig(attacks=("pgd7",), eps=Fraction(1, 3)),
    )
    file = folder / "checkpoints" / "best-00003-0000000.pt"
    rewrite(file, lambda state: state.update(config=to_dict(elsewhere)))
    places = []
    monkeypatch.setattr(
        data, "load_split", lambda where, split: places.append(where.dir) or load_split(where, split)
    )
    result = evaluated(folder, config("natural", subset=20), data_dir="here", device="cpu")
    assert places == ["here"]
    assert (result["eps"], result["n"]) == ("8/255", 20)
    assert list(result["attacks"]) == ["natural"]
    with pytest.raises(ConfigError, match="cuda:63"):
        evaluated(folder, config("natural"), data_dir="here")


def test_evaluation_is_in_float32_whatever_the_attacks_dtype_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    settings = replace(recipe("digits.mwpb_at"), precision=PrecisionConfig(device="cpu", attack_dtype="bf16"))
    file = folder / "checkpoints" / "best-00003-0000000.pt"
    rewrite(file, lambda state: state.update(config=to_dict(settings)))
    assert evaluated(folder, config("natural", "pgd2", subset=20))["dtype"] == "float32"


@pytest.mark.parametrize("command", ["evaluate", "trust"])
def test_named_checkpoint_is_held_to_its_sidecar(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "checkpoints" / "best-00003-0000000.pt"
    content = bytearray(file.read_bytes())
    weights = checkpoint.read(file)["model"]["conv1.weight"].numpy().tobytes()
    content[content.index(weights)] ^= 1  # a number of the weights: still a file that can be read
    file.write_bytes(content)
    assert cli.main([command, str(file), "--subset", "8"]) == 2
    error = capsys.readouterr().err
    assert f"{file}: damaged" in error
    assert error.count("\n") == 1
    assert not list(file.parent.glob("evaluation-*"))
    file.with_suffix(".pt.sha256").unlink()  # a copy without its sidecar cannot be checked
    assert cli.main(["evaluate", str(file), "--subset", "8", "--attacks", "natural"]) == 0


def test_copied_checkpoint_is_evaluated_as_it_says_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = EvaluationConfig(attacks=("natural", "pgd3"), eps=Fraction(1, 8), subset=16)
    file = folder / "checkpoints" / "best-00003-0000000.pt"
    settings = replace(recipe("digits.mwpb_at"), evaluation=own)
    rewrite(file, lambda state: state.update(config=to_dict(settings)))
    away = folder / "away"
    (away / "deep").mkdir(parents=True)
    for stray in (away, away / "deep"):
        (stray / "config.yaml").write_text("somebody: else's\n")
        (stray / "x.pt").write_bytes(file.read_bytes())
    monkeypatch.chdir(away)
    for name in ("x.pt", "deep/x.pt"):
        assert cli.main(["evaluate", name, "--step-size", "1/99"]) == 0
        result = json.loads((Path(name).parent / "evaluation-x.json").read_text())
        assert (result["eps"], result["step_size"], result["n"]) == ("1/8", "1/99", 16)
        assert list(result["attacks"]) == ["natural", "pgd3"]
    rewrite(file, lambda state: state["config"].update(nonsense=1))
    assert cli.main(["evaluate", str(file)]) == 2
    assert str(file) in capsys.readouterr().err.splitlines()[-1]
