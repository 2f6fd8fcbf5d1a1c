"""The thread that writes checkpoints: what it writes and when, what becomes of failures, kills and stops."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import StopAfter, assert_same, final_state, tiny

from mwpb_fast import train
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import epoch_line, read_records
from mwpb_fast.runs.writer import EVALUATED, Writer
from mwpb_fast.system.files import write_atomically
from mwpb_fast.system.signals import Interrupted

CPU = torch.device("cpu")


def state(epoch: int) -> dict[str, Any]:
    weights = {"w": torch.full((8, 8), float(epoch))}
    return dict.fromkeys(EVALUATED) | {"epoch": epoch, "batch": 0, "model": weights, "ema": None}


def written(folder: Path) -> list[str]:
    return [path.name for kind in ("best", "last") for path in checkpoint.existing(folder, kind)]


class Gate:
    """The writing of files, which waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.names = threading.Event(), list[str]()
        monkeypatch.setattr(checkpoint, "write_atomically", self)

    def __call__(self, path: Path, content: bytes) -> None:
        assert self.open.wait(20)
        self.names.append(path.name)
        write_atomically(path, content)


def test_what_was_taken_is_written_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, writer, first = Gate(monkeypatch), Writer(tmp_path, CPU), state(3)
    stall = writer.take(first, "best", "last")
    writer.begin()
    first["model"]["w"].zero_()  # training goes on
    assert written(tmp_path) == []
    threading.Timer(0.2, gate.open.set).start()
    assert writer.take(state(4), "last") > 0.15 > stall  # one epoch's at a time
    assert gate.names == [
        "best-00002-0000000.pt.sha256",
        "best-00002-0000000.pt",
        "best-00002-0000000.safetensors",
        "last-00003-0000000.pt.sha256",
        "last-00003-0000000.pt",
    ]
    writer.begin()
    writer.wait()
    assert written(tmp_path) == ["best-00002-0000000.pt", *(f"last-0000{n}-0000000.pt" for n in (4, 3))]
    for kind in ("best", "last"):
        read = checkpoint.read(checkpoint.existing(tmp_path, kind)[-1])
        assert torch.equal(read["model"]["w"], torch.full((8, 8), 3.0))
    assert "ema" not in checkpoint.read(checkpoint.existing(tmp_path, "best")[0])


def test_a_failure_is_raised_at_the_next_call_and_nothing_is_written_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    for call in (Writer.wait, lambda w: w.take(state(4), "last"), lambda w: w.now(state(4), "last")):
        writer = Writer(tmp_path, CPU)
        writer.take(state(3), "best", "last")
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_atomically", full)
            writer.begin()
            for _ in range(2):
                with pytest.raises(checkpoint.CheckpointWriteError, match=r"best-00002.*No space left"):
                    call(writer)
        writer.close()
        assert capsys.readouterr().err == ""  # it has been told
    assert written(tmp_path) == []
    writer = Writer(tmp_path, CPU)
    writer.take(state(3), "last")
    monkeypatch.setattr(checkpoint, "write_atomically", full)
    writer.begin()
    writer.close()  # of a run that something else has ended
    assert "last-00003-0000000.pt: cannot be written: No space left on device" in capsys.readouterr().err


def test_without_room_for_a_copy_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("copy.deepcopy", refuse)
    writer = Writer(tmp_path, CPU)
    writer.take(state(3), "best", "last")
    assert written(tmp_path) == ["best-00002-0000000.pt", "last-00003-0000000.pt"]
    writer.begin()
    writer.wait()


def test_a_kill_while_it_writes_costs_the_epoch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the disk when it comes to the last epoch's files: from there the same run comes out."""
    config = tiny("--epochs=2", "--data.subset=64", "--evaluation.validate_every=2")
    files = ("best-00002-0000000.pt", "last-00003-0000000.pt")

    def seen(path: Path, content: bytes) -> None:
        if path.name in files:
            shutil.copytree(tmp_path / "whole", tmp_path / path.name)
        write_atomically(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", seen)
    train.run(config, tmp_path / "whole", quiet=True)
    monkeypatch.undo()
    for killed in (tmp_path / file for file in files):
        assert final_state(killed)["epoch"] == 2
        assert len(read_records(killed / "metrics.jsonl")) == 2
        train.run(config, killed, quiet=True)
        assert_same(final_state(tmp_path / "whole"), final_state(killed))
        assert [r["epoch"] for r in read_records(killed / "metrics.jsonl")] == [1, 2]


def test_a_stop_waits_for_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path, content: bytes) -> None:
        time.sleep(0.1)
        write_atomically(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", slow)
    config = tiny("--data.subset=128", "--data.validation=0")
    trainer = train.Trainer(config, tmp_path, StopAfter(2), quiet=True)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        trainer.train()
    assert written(tmp_path / "checkpoints") == ["last-00002-0000001.pt", "last-00002-0000000.pt"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_whose_checkpoints_cannot_be_written_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    calls: list[Callable[..., Any]] = []

    def full(path: Path, content: bytes) -> None:
        calls.append(full)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(checkpoint.CheckpointWriteError, match="No space left"):
        train.run(tiny(f"--epochs={epochs}", "--data.subset=64"), tmp_path, quiet=True)
    assert len(calls) == 1


def test_the_stall_is_on_record_and_in_the_line_of_an_epoch(tmp_path: Path) -> None:
    record = train.run(tiny("--epochs=1", "--data.subset=64"), tmp_path)
    assert 0 < record["checkpoint"] < 20
    assert read_records(tmp_path / "metrics.jsonl") == [record]
    assert epoch_line(record | {"checkpoint": 0.26}, 1).endswith(" images/s checkpoint 0.3 s")
    assert epoch_line(record | {"checkpoint": 0.09}, 1).endswith(" images/s")


def test_on_cuda_the_copies_go_to_the_host_beside_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread has a stream of its own, which waits for the copies on the device and for nothing after them."""
    calls: list[str] = []

    class Stream:
        device = torch.device("cuda:1")

        def record_event(self) -> str:
            calls.append("training records")
            return "copied"

        def wait_event(self, event: str) -> None:
            calls.append(f"{threading.current_thread().name} waits until {event}")

    @contextlib.contextmanager
    def stream(one: Stream) -> Iterator[None]:
        calls.append(f"{threading.current_thread().name} takes a stream")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(checkpoint, "save", lambda *words, **more: calls.append("saves"))
    writer = Writer(tmp_path, torch.device("cuda:1"))
    writer.take(state(3), "last")
    writer.begin()
    writer.wait()
    thread = "mwpb-checkpoints"
    assert calls == ["training records", f"{thread} takes a stream", f"{thread} waits until copied", "saves"]
