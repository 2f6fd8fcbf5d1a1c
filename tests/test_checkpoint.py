"""Checkpoints: atomic, verified, never unpickled, and the one before serves where the newest is damaged."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.checkpoint import CheckpointError, CheckpointWriteError


def state(value: float) -> dict[str, object]:
    return {"epoch": 3, "model": {"w": torch.full((64, 64), value)}, "config": {"eps": "8/255"}, "best": None}


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, "last", 3, 7, state(1.5))
    assert path.name == "last-00003-0000007.pt"
    read = checkpoint.read(path)
    assert read["config"] == {"eps": "8/255"}
    assert torch.equal(read["model"]["w"], torch.full((64, 64), 1.5))
    listed, name = path.with_suffix(".pt.sha256").read_text().split()
    assert (listed, name) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


def test_only_the_newest_of_a_kind_are_kept(tmp_path: Path) -> None:
    for epoch in range(5):
        checkpoint.save(tmp_path, "last", epoch, 0, state(epoch))
    checkpoint.save(tmp_path, "best", 1, 0, state(9))
    kept = [path.name for path in checkpoint.existing(tmp_path, "last")]
    assert kept == ["last-00004-0000000.pt", "last-00003-0000000.pt"]
    assert len(list(tmp_path.iterdir())) == 6  # two of one kind, one of the other, a sidecar each
    assert checkpoint.read_newest(tmp_path, "nothing") is None


def test_any_damage_is_detected_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "last", 1, 0, state(1))
    newest = checkpoint.save(tmp_path, "last", 2, 0, state(2))
    good = newest.read_bytes()
    dice = random.Random(0)
    for trial in range(100):
        if trial % 2:
            bad = good[: dice.randrange(len(good))]
        else:
            at = dice.randrange(len(good))
            bad = good[:at] + bytes([good[at] ^ (1 << dice.randrange(8))]) + good[at + 1 :]
        newest.write_bytes(bad)
        found = checkpoint.read_newest(tmp_path, "last")
        assert found is not None
        assert found[1]["model"]["w"][0, 0] == 1
    checkpoint.existing(tmp_path, "last")[1].write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_newest(tmp_path, "last")


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("through_torch", [True, False])
def test_a_malicious_pickle_is_refused_unexecuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through_torch: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last-00001-0000000.pt"
    if through_torch:
        torch.save({"x": Malicious()}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Malicious()}))
    path.with_suffix(".pt.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.read(path)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, "last", 1, 0, state(1))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointWriteError, match=r"last-00002.*No space left"):
        checkpoint.save(tmp_path, "last", 2, 0, state(2))
    monkeypatch.undo()
    found = checkpoint.read_newest(tmp_path, "last")
    assert found is not None
    assert found[0].name == "last-00001-0000000.pt"
    assert not list(tmp_path.glob(".*tmp"))


WRITER = """
import sys, torch
from pathlib import Path
from mwpb_fast.runs import checkpoint
print("ready", flush=True)
for epoch in range(100000):
    state = {"epoch": epoch, "w": torch.full((200, 200), float(epoch))}
    checkpoint.save(Path(sys.argv[1]), "last", epoch, 0, state)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path: Path) -> None:
    dice = random.Random(0)
    for trial in range(20):
        folder = tmp_path / str(trial)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not checkpoint.existing(folder, "last"):
            time.sleep(0.001)
        time.sleep(dice.random() * 0.2)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = checkpoint.read_newest(folder, "last")
        assert found is not None
        assert (found[1]["w"] == found[1]["epoch"]).all()
