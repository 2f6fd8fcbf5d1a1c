"""Output that nobody takes any more: closed, full, or its reader gone. Work goes on; what only prints says so."""

from __future__ import annotations

import errno
import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mwpb_fast import cli
from mwpb_fast.cli import commands
from mwpb_fast.runs.log import read_records
from mwpb_fast.system.streams import Lasting

RUN = (f"{sys.executable} -m mwpb_fast train digits.at --epochs 3 --optim.drops=[] --data.subset 32 "
       "--data.batch_size 16 --data.validation 0 --attack.steps 1 --model.name smallresnet-16 "
       "--no-evaluate --out run")  # fmt: skip


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (">&-", ""),
        ("2>&-", ""),
        ("<&- >&- 2>&-", ""),
        ("> /dev/full", "standard output: No space left on device"),
        ("> /dev/full 2>&1", ""),
        ("| head -n 0", ""),
    ],
)
def test_training_goes_on_to_its_end(tmp_path: Path, ending: str, said: str) -> None:
    done = shell(f"{RUN} {ending}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr if said else done.stderr == ""
    assert [record["epoch"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "run" / "train.lock").read_bytes() == b""  # what is printed gets into no file


def test_a_terminal_that_goes_away_with_its_progress_bar(tmp_path: Path) -> None:
    """Writes then fail with EIO; the bar of rich writes from a thread of its own. SIGHUP is ignored."""
    master, terminal = pty.openpty()
    words = RUN.replace("--epochs 3", "--epochs 40").split()
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    while b"epoch   2/" not in seen:
        seen += os.read(master, 1024)
    os.close(master)
    assert process.wait() == 0
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 40


@pytest.mark.parametrize("line", ["recipes", "data list", "--help", "train --help"])
def test_what_only_prints_says_that_it_could_not(line: str, tmp_path: Path) -> None:
    done = shell(f"{sys.executable} -m mwpb_fast {line} > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("mwpb-fast: standard output: No space left on device")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_enough_is_no_failure(tmp_path: Path) -> None:
    done = shell(f"{sys.executable} -m mwpb_fast recipes | head -n 1", tmp_path)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")


class Broken(io.StringIO):
    """A stream without a descriptor that fails."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_lasting_stream_notes_the_first_failure() -> None:
    stream = Lasting(Broken())
    assert stream.broken == ""
    print("x", file=stream, flush=True)  # type: ignore[call-overload]
    print("y", file=stream, flush=True)  # type: ignore[call-overload]
    assert stream.broken == "Input/output error"
    closed = io.StringIO()
    closed.close()
    stream = Lasting(closed)
    stream.write("x")
    stream.flush()
    assert "closed" in stream.broken


def test_lasting_stream_escapes_what_its_encoding_lacks() -> None:
    raw = io.BytesIO()
    stream = Lasting(io.TextIOWrapper(raw, encoding="latin-1"))
    stream.write("r\udcff € é")
    stream.flush()
    assert raw.getvalue() == b"r\\udcff \\u20ac \xe9"


def test_streams_are_given_back(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdout, sys.stderr
    monkeypatch.setitem(commands.COMMANDS, "try", ("", lambda words: print("done") or 0))
    assert cli.main(["try"]) == 0
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "done\n"
