"""`mwpb-fast completion`: the script is asked by a shell as it asks at Tab."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mwpb_fast import cli
from mwpb_fast.cli import completion
from mwpb_fast.cli.commands import COMMANDS
from mwpb_fast.config import all_recipes, names
from mwpb_fast.system.optional import Attempt, attempt

needs_shtab = pytest.mark.skipif(attempt("shtab").module is None, reason="shtab is not installed")


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Path:
    assert cli.main(["completion", "bash"]) == 0
    file = tmp_path / "mwpb-fast.bash"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    return file


def offered(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words, by the function that the script has named to it."""
    ask = """
    source "$1"; shift
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
    [[ $(complete -p mwpb-fast) =~ -F\\ ([^ ]+) ]] && "${BASH_REMATCH[1]}"
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    call = ["bash", "-c", ask, "bash", str(script), "mwpb-fast", *words]
    done = subprocess.run(call, capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@needs_shtab
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(script: Path) -> None:
    assert offered(script, "") >= set(COMMANDS)
    assert offered(script, "tr") == {"train", "trust"}
    assert offered(script, "train", "table1.") == {name for name in all_recipes() if name.startswith("table1.")}
    assert offered(script, "train", "digits.at", "--no-") == {"--no-resume", "--no-evaluate"}
    assert offered(script, "train", "digits.at", "--objective", "") == set(names("objectives"))
    assert "--objective.beta" in offered(script, "train", "digits.at", "--objective.")  # TRADES' own
    assert offered(script, "train", "digits.at", "--attack.start", "g") == {"gaussian"}
    assert offered(script, "train", "digits.at", "--natural_pass", "") == {"true", "false"}
    assert offered(script, "reproduce", "table") == {f"table{i}" for i in range(1, 9)}
    assert offered(script, "export", "run", "--format", "o") == {"onnx"}
    (script.parent / "runs").mkdir()
    assert offered(script, "report", "ru") == {"runs"}


INTERACTIVE = {
    "zsh": (["-f", "-i"], "fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D; echo rea''dy"),
    "tcsh": (["-f", "-i"], "set autolist; source {folder}/_mwpb-fast; echo rea''dy"),
}


def shown_at_tab(shell: str, folder: Path, line: str, wanted: str) -> str:
    """What a shell's terminal shows after a line and Tab, up to what is wanted, for 20 seconds."""
    options, beginning = INTERACTIVE[shell]
    terminal, its = pty.openpty()
    environment = os.environ | {"TERM": "vt100", "HOME": str(folder)}
    controlled = ["setsid", "--ctty", shell, *options]  # tcsh edits lines on its controlling terminal alone
    process = subprocess.Popen(controlled, stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    try:
        shown = ""
        for typed, awaited in ((beginning.format(folder=folder) + "\n", "ready"), (f"{line}\t\t", wanted)):
            os.write(terminal, typed.encode())
            shown, end = "", time.monotonic() + 20
            while awaited not in shown and time.monotonic() < end:
                if select.select([terminal], [], [], 0.1)[0]:
                    shown += os.read(terminal, 65536).decode(errors="replace")
        return shown
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@needs_shtab
@pytest.mark.parametrize("shell", INTERACTIVE)
def test_a_terminal_completes_at_tab(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    assert cli.main(["completion", shell]) == 0
    (tmp_path / "_mwpb-fast").write_text(capsys.readouterr().out, encoding="utf-8")
    for line, wanted in (
        ("mwpb-fast tr", "trust"),
        ("mwpb-fast train digits.at --objective ", "trades"),
        ("mwpb-fast train digits.at --attack.start g", "gaussian"),
    ):
        assert wanted in shown_at_tab(shell, tmp_path, line, wanted)


@needs_shtab
@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    wanted = ["mwpb-fast", *COMMANDS, *([] if shell == "tcsh" else ["table1.mwpb_at", "--budget.alpha"])]
    assert not [name for name in wanted if name not in out]


@pytest.mark.parametrize("broken", [False, True])
def test_no_shtab(broken: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(completion, "attempt", lambda name: Attempt(None, "is not there", broken))
    assert cli.main(["completion", "bash"]) == 2
    out, err = capsys.readouterr()
    cure = "--force-reinstall --no-deps shtab" if broken else "'mwpb-fast[completion]'"
    assert (out, err.count("\n"), err.rstrip().endswith(cure)) == ("", 1, True)
