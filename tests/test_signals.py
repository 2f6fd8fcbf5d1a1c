"""Signals: which are heeded, with which status, what stays ignored, and that no handler of errors takes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import final_state, tiny

from mwpb_fast import cli, models, train
from mwpb_fast.cli import commands
from mwpb_fast.data import store
from mwpb_fast.reproduce import execute
from mwpb_fast.reproduce.failures import Failures
from mwpb_fast.runs import checkpoint
from mwpb_fast.system.signals import STOPS, Interrupted, raised, stop_requests

COMMAND = [sys.executable, "-m", "mwpb_fast"]
ENDLESS = ["train", "digits.at", "--epochs=100000", "--data.subset=64", "--data.batch_size=16", "--attack.steps=1",
           "--model.name=smallresnet-16", "--no-evaluate", "--out=run"]  # fmt: skip


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_signal_checkpoints_and_leaves_with_its_status(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([*COMMAND, *ENDLESS], stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("training ")
    assert process.stdout.readline().startswith("epoch ")
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == status
    assert err == f"mwpb-fast: stopped by {number.name}; the same command goes on from here\n"
    assert final_state(tmp_path / "run")["epoch"] >= 2


def test_what_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    """As under nohup; a shell gives the same to what it puts in the background. SIGTERM then ends it."""

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*COMMAND, *ENDLESS], stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, preexec_fn=nohup
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("training ")
    assert process.stdout.readline().startswith("epoch ")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    for _ in range(3):  # it goes on
        assert process.stdout.readline().startswith("epoch ")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err


@pytest.fixture(autouse=True)
def _handlers() -> Any:
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    assert {number: signal.getsignal(number) for number in STOPS} == before


def test_the_first_request_counts_and_only_a_second_sigterm_or_sigint_acts() -> None:
    with raised(), stop_requests() as request:
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        assert request.number == signal.SIGUSR1
        with pytest.raises(Interrupted, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)


def test_a_handler_of_another_language_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reports it as None and could not put it back."""
    real = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGHUP else real(number))
    with stop_requests() as request:
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        assert request.number == signal.SIGTERM


def test_an_interruption_is_no_exception() -> None:
    assert not issubclass(Interrupted, Exception)


def interrupted(*words: Any, **more: Any) -> Any:
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("the signal was lost")


def reading(folder: Path) -> None:
    checkpoint.read(checkpoint.save(folder, "last", 1, 0, {"x": 1}))


def staged(folder: Path) -> None:
    with store.staging(folder / "set") as stage:
        stage.write("x.safetensors", {"a": torch.zeros(1).numpy()})


def reading_weights(folder: Path) -> None:
    torch.save({}, folder / "x.pt")
    models.read_checkpoint(folder / "x.pt")


@pytest.mark.parametrize(
    ("place", "work"),
    [
        ("torch.load", reading),
        ("torch.load", reading_weights),
        ("mwpb_fast.data.download.sha256_of", staged),
        ("mwpb_fast.data.download.sha256_of", lambda folder: store.read_tensors(folder / "x", "", ())),
    ],
    ids=["checkpoint", "weights", "saving data", "reading data"],
)
def test_a_signal_inside_a_read_or_write_is_no_damaged_file(
    place: str,
    work: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "x").write_bytes(b"")
    monkeypatch.setitem(commands.COMMANDS, "try", ("", lambda words: work(tmp_path)))
    monkeypatch.setattr(place, interrupted)
    assert cli.main(["try"]) == 143
    assert capsys.readouterr().err == "mwpb-fast: stopped by SIGTERM; the same command goes on from here\n"


def test_a_signal_in_a_row_of_a_table_is_no_failure_of_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Planned:
        folder, name = tmp_path, "row"

    run: Any = Planned()
    failures = Failures([run])
    monkeypatch.setattr(execute, "exclusive", interrupted)
    with raised(), pytest.raises(Interrupted):
        execute._attempt(run, "", True, failures, set())
    assert not failures.all()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_outside_training_they_end_the_command_too(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(commands.COMMANDS, "try", ("", lambda words: os.kill(os.getpid(), number)))
    assert cli.main(["try"]) == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().err


def test_a_second_sigterm_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(tiny("--epochs=1"), tmp_path, quiet=True)
    before = checkpoint.existing(tmp_path / "checkpoints", "last")[0].read_bytes()

    def impatient(path: Path, content: bytes) -> None:
        for _ in range(2):  # one after the other: of two at the same time the process takes one
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
        impatient.gone = True  # type: ignore[attr-defined]
        raise OSError("nobody waits any more")

    impatient.gone = False  # type: ignore[attr-defined]
    monkeypatch.setattr("mwpb_fast.runs.checkpoint.write_atomically", impatient)
    with raised(), pytest.raises(Interrupted):
        train.run(tiny("--epochs=2"), tmp_path, quiet=True)
    assert not impatient.gone  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name == "mwpb-checkpoints":
            thread.join()
    monkeypatch.undo()
    assert checkpoint.existing(tmp_path / "checkpoints", "last")[0].read_bytes() == before
    assert train.run(tiny("--epochs=2"), tmp_path, quiet=True)["epoch"] == 2
