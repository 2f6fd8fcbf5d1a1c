"""The command line: exit statuses, one-line errors, and each command from end to end."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mwpb_fast import cli
from mwpb_fast.cli import commands
from mwpb_fast.config import ConfigError
from mwpb_fast.data.dataset import DataError
from mwpb_fast.system.signals import Interrupted

TINY = [
    "--data.subset",
    "128",
    "--epochs",
    "2",
    "--warmup_epochs",
    "1",
    "--optim.drops",
    "[]",
    "--precision.device",
    "cpu",
]


def run(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mwpb_fast", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
        timeout=300,
    )


def one_error_line(text: str) -> str:
    assert text.startswith("mwpb-fast: error: ")
    assert text.count("\n") == 1
    return text


# bad input --------------------------------------------------------------------------------------------------
BAD = {
    "": "usage: mwpb-fast COMMAND",
    "nope": "no command 'nope'; there are train, evaluate,",
    "tran": "no command 'tran'; did you mean train?\n",
    "train": "which recipe?",
    "train tabel1.mwpb_at": "did you mean table1.mwpb_at",
    "train table1.mwpb_at extra": "unrecognized arguments: extra",
    "train table1.mwpb_at --epochs x": "epochs: x is not a whole number",
    "train table1.mwpb_at --epoch 3": "did you mean epochs?",
    "train table1.mwpb_at --no-resum": "no option 'no-resum'; did you mean --no-resume?\n",
    "train table1.mwpb_at --data.name cifar-10": "tinyimagenet; did you mean cifar10?\n",
    "train table1.mwpb_at --data.dir no": "run `mwpb-fast data prepare cifar10 --dir no` first, or say where",
    "train table1.mwpb_at --no-evaluate": "missing; run `mwpb-fast data prepare cifar10` first",
    "train table1.mwpb_at --budget margn": "the budgets: deviation, fixed, margin; did you mean margin?\n",
    "plot . --ou x": "unrecognized arguments: --ou x; did you mean --out?",
    "reproduce table-1": "no table 'table-1'; did you mean table1?\n",
    "reproduce table1 --rows mwpb-mrat": "no row 'mwpb-mrat'; did you mean mwpb_mart",
    "train table1.mwpb_at --seed": "--seed wants a value",
    "train table1.mwpb_at --config absent.yaml": "absent.yaml: No such file or directory",
    "train table1.mwpb_at --model.name resnet-": "model.name: ",
    "train table1.mwpb_at --evaluation.attacks pgd": "no attack 'pgd'",
    "evaluate": "required: RUN|FILE",
    "evaluate absent": "absent: does not exist",
    "evaluate . --attacks pgd20,nope": "config.yaml: missing",
    "evaluate . --recipe table1.at --attacks nope": "no attack 'nope'",
    "evaluate . --recipe table1.at --attacks pgd20@x": "pgd20@x: 'x' is not a radius",
    "evaluate . --recipe table1.at --attacks natural@1/2": "natural has no radius",
    "evaluate . --recipe table1.at --costly-subset -1": "subset not negative",
    "trust": "required: RUN|FILE",
    "trust absent": "absent: does not exist",
    "trust . --eps 8/0 --recipe table1.at": "'8/0' is not a radius",
    "evaluate . --recipe table1.at --eps 8/0": "'8/0' is not a radius",
    "evaluate . --recipe table1.at --eps 8": "eps is 8, but images lie in [0, 1]: did you mean 8/255?",
    "trust . --eps 8 --recipe table1.at": "eps is 8, but images lie in [0, 1]: did you mean 8/255?",
    "evaluate . --recipe table1.at --subset -1": "subset not negative",
    "evaluate . --recipe table1.at --subset x": "invalid int value: 'x'",
    "evaluate . --epochs 3": "unrecognized arguments: --epochs=3",
    "evaluate . --recipe table1.at --attacks pgd3 --tf32": "--tf32 has no effect on pgd3",
    "evaluate . --recipe table1.at --attacks pgd3,spsa --engine eager": "has no effect on pgd3, spsa",
    "evaluate . --attacks aa --engine twin": "argument --engine: invalid choice: 'twin'",
    "evaluate . --recipe table1.at --attacks aa --engine eager --tf32": "tf32 is of the twin",
    "evaluate . --which worst": "invalid choice: 'worst'",
    "data": "required: list|prepare",
    "data prepare": "which data set?",
    "data prepare nope": "'nope' is not a known data set",
    "data prepare cifar10 --offline --dir absent": "--data-dir",
    "data prepare cifar10 --from absent": "absent: does not exist",
    "plot": "required: RUN",
    "plot absent": "absent: there is no such folder",
    "plot a b": "say where to with --out DIR",
    "recipes x": "unrecognized arguments: x",
    "doctor x": "unrecognized arguments: x",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_ends_with_2_and_one_line(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert BAD[line] in (one_error_line(err) if line else err)
    assert list(tmp_path.iterdir()) == []


def processor_time() -> float:
    """Of the processes that have ended, in seconds: what others do on the machine does not enter it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "line", ["train table1.mwpb_at --budget.eps 8/0", "train table1.mwpb_at --data.name x", "evaluate x", "nope"]
)
def test_bad_input_is_refused_at_once_and_without_torch(line: str, tmp_path: Path) -> None:
    script = (
        "import sys; from mwpb_fast.cli import main; status = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    before = processor_time()
    command = [sys.executable, "-c", script, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    one_error_line(done.stderr)
    assert processor_time() - before < 3


def test_bad_run_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("recipe: x\n")
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert str(tmp_path / "config.yaml") in one_error_line(capsys.readouterr().err)


# exit statuses ----------------------------------------------------------------------------------------------
def fail_with(error: BaseException) -> Callable[[Any], int]:
    def command(arguments: Any) -> int:
        raise error

    return command


@pytest.fixture
def with_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], int]], None]:
    return lambda command: monkeypatch.setitem(commands.COMMANDS, "try", ("", command))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("bad\nvalue"), 2, "error: bad value"),
        (DataError("x.bin: truncated"), 2, "error: x.bin: truncated"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 1, "error: runs/a: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 1, "error: runs: Permission denied"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM; the same command goes on from here"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT; the same command goes on from here"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    ],
)
def test_status_of_an_error(
    error: BaseException,
    status: int,
    message: str,
    with_command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MWPB_DEBUG", raising=False)
    with_command(fail_with(error))
    assert cli.main(["try"]) == status
    assert capsys.readouterr().err == f"mwpb-fast: {message}\n"
    for arguments, variable in ((["try", "--debug"], ""), (["try"], "1")):
        monkeypatch.setenv("MWPB_DEBUG", variable)
        with pytest.raises(type(error)):
            cli.main(arguments)


def test_status_of_training_and_checkpoint_errors() -> None:
    from mwpb_fast.runs.checkpoint import CheckpointError, CheckpointWriteError
    from mwpb_fast.train import TrainingError

    assert cli.entry._status(CheckpointError("x")) == 2
    assert cli.entry._status(CheckpointWriteError("x")) == 1
    assert cli.entry._status(TrainingError("x")) == 1


def test_an_unforeseen_error_keeps_its_traceback(with_command: Callable[..., None]) -> None:
    with_command(fail_with(ZeroDivisionError("x")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_outside_training(
    number: int, status: int, with_command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command(arguments: Any) -> int:
        os.kill(os.getpid(), number)
        time.sleep(10)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    with_command(command)
    assert cli.main(["try"]) == status
    assert "stopped by" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_unwritable_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["train", "digits.mwpb_at", *TINY, "--out", str(tmp_path / "file" / "run")]) == 1
    assert str(tmp_path / "file") in one_error_line(capsys.readouterr().err)


def test_reader_that_leaves_is_no_error() -> None:
    script = f"{sys.executable} -m mwpb_fast recipes | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
