"""What needs the configuration only imports no torch: every option of every command is read, listed and refused
where an import of torch fails and is told of."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plots import make_run

from mwpb_fast.cli.commands import COMMANDS
from mwpb_fast.cli.parser import parser_of
from mwpb_fast.config import AXES, axis_config, load, names, recipe, recipes_of, to_dict
from mwpb_fast.options import show, values_of

START = "digits.mwpb_at"
MISFITS = ("of the attack, which attack", "ascends a loss of its own", "finds every sample's radius itself")
# words that each command refuses or answers after its options are read, before anything is done
QUICK = {
    "train": f"{START} --help",
    "evaluate": "absent",
    "trust": "absent",
    "verify": "absent absent",
    "reproduce": "table1 --rows nope",
    "data": "prepare",
    "plot": "absent",
    "export": "absent --format safetensors",
    "report": "absent",
    "recipes": "x",
    "doctor": "x",
    "bench": "nope",
    "completion": "x",
}
HIDDEN = """
import contextlib, io, json, sys

asked = []

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            asked.append(name)
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
from mwpb_fast import cli

answers = []
for words in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = cli.main(words)
        except BaseException as error:
            status = repr(error)
    answers.append((status, out.getvalue(), err.getvalue(), asked[:]))
    asked.clear()
json.dump(answers, sys.stdout)
"""


def answers(lines: list[list[str]], folder: Path) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each line where torch is hidden; a line that asks for torch fails."""
    path = f"import sys; sys.path[:0] = {[entry for entry in sys.path if entry]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", path + HIDDEN], input=json.dumps(lines), capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for words, (status, _, err, asked) in zip(lines, found, strict=True):
        assert not asked, f"{' '.join(words)}: imports {asked[0]}"
        assert status in (0, 2), f"{' '.join(words)}: {status}"
        assert err.count("\n") == (status == 2), f"{' '.join(words)}: {err}"
    return [(status, out, err) for status, out, err, _ in found]


def own_options(command: str) -> list[Any]:
    """The options of a command that are not the configuration's."""
    actions = parser_of(COMMANDS[command][1])._actions
    return [action for action in actions if action.option_strings and action.dest != "help"]


def test_every_command_tells_what_it_takes(tmp_path: Path) -> None:
    tables = [recipes_of(load("recipes", stem))[0] for stem in names("recipes")]
    lines = [["--help"], ["--version"], ["recipes"], ["data", "list"], ["reproduce", "table1", "--render-only"]]
    lines += [[command, "--help"] for command in COMMANDS] + [["train", name, "--help"] for name in tables]
    for words, (status, out, _) in zip(lines, answers(lines, tmp_path), strict=True):
        assert status == 0, words
        assert out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command(command: str, tmp_path: Path) -> None:
    quick = [command, *QUICK[command].split()]
    lines = [quick]
    for action in own_options(command):
        name = action.option_strings[0]
        good = [name] if action.nargs == 0 else [name, *map(str, list(action.choices or [1])[:1])]
        lines += [[*quick, *good], [*quick, name, *(["?"] if action.nargs != 0 else [])]]
    found = answers(lines, tmp_path)
    assert found[0][0] == (0 if "--help" in quick else 2)
    typed = [line for line, (status, _, _) in zip(lines, found, strict=True) if status == 2]
    assert "--help" in quick or typed == lines


def test_every_option_of_the_configuration(tmp_path: Path) -> None:
    values = dict(values_of(recipe(START)))
    good = ["train", START, *(f"--{key}={show(value)}" for key, value in values.items()), "--help"]
    bad = [["train", START, f"--{key}=?", "--help"] for key in values]
    (status, out, _), *refused = answers([good, *bad], tmp_path)
    assert status == 0
    assert all(f"--{key} {show(value)}" in out for key, value in values.items())
    for (key, value), (status, _, err) in zip(values.items(), refused, strict=True):
        assert status == 2 or isinstance(value, str), key
        assert status == 0 or "?" in err or key in err


@pytest.mark.parametrize("axis", AXES)
def test_every_module_of_an_axis(axis: str, tmp_path: Path) -> None:
    kind = AXES[axis]
    swaps = [["train", START, f"--{axis}", name, "--help"] for name in names(kind)]
    for words, (status, out, err) in zip(swaps, answers(swaps, tmp_path), strict=True):
        assert (status == 0 and f"--{axis} {words[3]} " in out) or any(reason in err for reason in MISFITS), words
    lines = [["train", START, f"--{axis}", "nope", "--help"]]
    for name in names(kind):
        for field in dataclasses.fields(axis_config(kind, name)):
            lines.append(["train", START, f"--{axis}", name, f"--{axis}.{field.name}=?", "--help"])
    assert [status for status, _, _ in answers(lines, tmp_path)] == [2] * len(lines)


def test_how_a_run_is_to_be_attacked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(recipe(START))))
    bad = (
        "--attacks=nope",
        "--attacks=pgd20@x",
        "--attacks=natural@1/2",
        "--eps=8",
        "--step-size=8/0",
        "--subset=-1",
    )
    lines = [[command, str(tmp_path), word] for command in ("evaluate", "trust") for word in bad]
    lines += [["evaluate", str(tmp_path), "--recipe", START, word] for word in bad]
    assert {status for status, _, _ in answers(lines, tmp_path)} == {2}


def test_a_report_without_images(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    shutil.copy(Path(__file__).parent / "frozen" / "run" / "evaluation-best.json", tmp_path / "run")
    ((status, out, _),) = answers([["report", "run", "--no-images"]], tmp_path)
    assert (status, out) == (0, f"written: {Path('run') / 'report.html'}\n")
