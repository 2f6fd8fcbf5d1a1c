"""Runs whose states do not fit and whose folders are in disorder."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import final_state, tiny

from mwpb_fast import cli, train
from mwpb_fast.config import ConfigError
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.checkpoint import CheckpointError
from mwpb_fast.runs.folder import sweep

WORDS = ["train", "digits.mwpb_at", "--data.subset=64", "--data.batch_size=16", "--model.name=smallresnet-4",
         "--warmup_epochs=0", "--optim.drops=[]", "--attack.steps=1", "--no-evaluate", "--quiet"]  # fmt: skip


def drop(name: str, key: str) -> Any:
    return lambda state: state[name].pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["model"].update({"linear.bias": torch.zeros(1)}), r"model.linear.bias is \(1,\), not"),
        (drop("model", "linear.bias"), r"model.linear.bias is nothing, not \(10,\)"),
        (lambda s: s["model"].update(other=torch.zeros(1)), "does not fit this run: Error"),
        (lambda s: s.update(trace=torch.zeros(7, 11)), r"trace is \(7, 11\), not \(3, 11\)"),
        (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "loaded state dict"),
        (lambda s: s.update(ema=None), "it has no averaged weights"),
        (lambda s: s.pop("best"), "best"),
        (lambda s: s["config"]["optim"].update(lr="fast"), "optim.lr"),
        (lambda s: s.pop("config"), "of an earlier version"),
    ],
)
def test_a_state_that_does_not_fit_is_named_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    train.run(tiny("--epochs=1", "--optim.ema=0.5"), tmp_path, quiet=True)
    state = final_state(tmp_path)
    damage(state)
    checkpoint.save(tmp_path / "checkpoints", "last", 9, 0, state, keep=1)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        train.run(tiny("--epochs=2", "--optim.ema=0.5"), tmp_path, quiet=True)
    assert "\n" not in str(caught.value)
    assert "last-00009-0000000.pt" in str(caught.value)


def test_more_epochs_done_than_asked_for_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert cli.main([*WORDS, *out, "--epochs=3"]) == 0
    before = (tmp_path / "config.yaml").read_bytes()
    assert cli.main([*WORDS, *out, "--epochs=1"]) == 0
    assert f"{tmp_path} has done 3 epochs, more than the 1 asked for" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_bytes() == before
    loud = [word for word in WORDS if word != "--quiet"]
    assert cli.main([*loud, *out, "--epochs=3"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"already complete: {tmp_path} has done 3 epochs; a larger --epochs goes on")
    assert said.err == ""


# folders ---------------------------------------------------------------------------------------------------------
def test_what_killed_writers_left_is_swept_at_the_start(tmp_path: Path) -> None:
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    whole = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    places = ("checkpoints/last-00009-0000000.pt.sha256", "checkpoints/last-00000-0000000.pt",
              "checkpoints/.last-00009-0000000.pt.abcdefgh.tmp", ".config.yaml.x1y2_z3w.tmp",
              ".evaluation-best.json.old_abcd.tmp")  # fmt: skip
    kept = (".evaluation-best.json.new_abcd.tmp", ".mine.tmp", "checkpoints/mine.pt", "checkpoints/.mine.pt.a.tmp")
    for name in (*places, *kept):
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / ".evaluation-best.json.old_abcd.tmp", (time.time() - 10**5,) * 2)
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    assert not [name for name in places if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)
    assert whole <= {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_a_lone_checkpoint_without_its_checksum_is_not_swept(tmp_path: Path) -> None:
    """It may be all that somebody has; it is refused by name."""
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    for path in (tmp_path / "checkpoints").glob("last-*.sha256"):
        path.unlink()
    with pytest.raises(CheckpointError, match="sha256"):
        train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    sweep(tmp_path)
    assert checkpoint.existing(tmp_path / "checkpoints", "last")


def test_a_damaged_newer_checkpoint_does_not_displace_the_one_that_is_written(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "best", 7, 0, {"epoch": 7}).write_bytes(b"damaged")
    written = checkpoint.save(tmp_path, "best", 5, 0, {"epoch": 5}, keep=1)
    assert checkpoint.existing(tmp_path, "best") == [written]
    assert checkpoint.read_newest(tmp_path, "best") == (written, {"epoch": 5})


def test_a_file_for_a_folder_and_one_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert cli.main([*WORDS, "--epochs=1", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"mwpb-fast: error: {tmp_path / 'file'}: is a file, not a folder\n"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").write_text("x")
    assert cli.main([*WORDS, "--epochs=1", "--out", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err.count("\n") == 1

    def gone(self: Any) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "run")
        return {}

    monkeypatch.setattr(train.Trainer, "validate", gone)
    assert cli.main([*WORDS, "--epochs=2", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err == f"mwpb-fast: error: {tmp_path / 'run' / 'metrics.jsonl'}: No such file or directory\n"


def test_paths_that_are_no_text(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Bytes of another encoding, in a folder of the run, its data folder and its messages."""
    folder = tmp_path / os.fsdecode(b"r\xff\xe9")
    folder.mkdir()
    words = ["--epochs=1", "--out", str(folder / "run"), "--data.dir", str(folder)]
    assert cli.main([*WORDS, *words]) == 0
    assert cli.main(["train", "--config", str(folder / "run" / "config.yaml"), "--out", str(folder / "b"),
                     "--no-evaluate", "--quiet"]) == 0  # fmt: skip
    assert cli.main(["evaluate", str(folder / "run"), "--attacks=natural", "--subset=5"]) == 0
    assert cli.main(["evaluate", str(folder / "absent")]) == 2
    assert b"Traceback" not in capfdbinary.readouterr().err
