"""The Python of the README and of the pages that go on from it runs as it is written, and their commands are
commands that there are."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mwpb_fast.cli import main
from mwpb_fast.cli.commands import COMMANDS
from mwpb_fast.cli.parser import split
from mwpb_fast.options import configure

ROOT = Path(__file__).resolve().parents[1]
OWN = ("--out", "--config", "--no-resume", "--no-evaluate", "--quiet", "--json", "--track", "--help")
README = (ROOT / "README.md").read_text()
EXTEND = (ROOT / "docs" / "extend.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
TEXTS = "\n".join(WRITTEN.values())
# of a line `    mwpb-fast train RECIPE ...   # comment`, or of the same in backquotes
LINES = re.findall(r"(?:^ {4}(?:[A-Z_]+=\S+ )*(?:torchrun .*-m )?|`)mwpb[-_]fast ([^`#&\n]*)", TEXTS, re.MULTILINE)

# what else a line of a block may begin with: programs that are not ours
OTHERS = ("make", "pip", "cd", "python", "torchrun", "srun", "#SBATCH")


def test_python_blocks_run() -> None:
    for text, count, result in ((README, 1, "x_adv"), (EXTEND, 2, "result")):
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == count
        shared: dict[str, Any] = {"__name__": "readme"}
        for block in blocks:
            exec(compile(block, "README.md", "exec", dont_inherit=True), shared)
        assert shared[result].isfinite().all() if result == "x_adv" else shared[result].finite


def test_objective_of_the_guide_is_taken_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", EXTEND, re.DOTALL) if "class Config" in b)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "smoothed.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "mine.smoothed"):  # another test's module of that name
        monkeypatch.delitem(sys.modules, name, raising=False)
    words = ["--objective=mine.smoothed", "--objective.smoothing=0.2"]
    assert configure("digits.mwpb_at", {}, words).objective.smoothing == 0.2


@pytest.mark.parametrize("name", WRITTEN)
def test_every_block_is_one_that_a_test_runs(name: str) -> None:
    """Python runs, here or in test_site.py; diagrams are drawn from the code; a line of an indented block is a
    command that is looked at below, or names a script or a rule that is there."""
    text = WRITTEN[name]
    assert set(re.findall(r"^```(\w+)", text, re.MULTILINE)) <= {"python", "mermaid"}
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.findall(r"(?<=\n\n)(?: {4}\S.*\n)+", bare):
        if "In YAML, the same:\n\n" + block in bare:  # a test below has it
            continue
        for line in block.splitlines():
            program, *words = re.sub(r"^ *(?:[A-Z_]+=\S+ )*", "", line).split()
            assert program in ("mwpb-fast", *OTHERS), f"{name}: {line}"
            if program == "make":
                assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            if program == "python":
                assert any((folder / words[0]).exists() for folder in (ROOT, ROOT / "examples")), line


@pytest.mark.parametrize("line", sorted({line.strip() for line in LINES} - {""}))
def test_commands_are_commands(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split()
    assert words[0] in {*COMMANDS, "COMMAND", "--version", "--help"}
    if words[0] == "train" and words[1:2] > ["a"] and "mine.smoothed" not in words:
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        named, overrides = split(words[1:], OWN)
        config = configure(named[0], {}, overrides)
        assert config.epochs > config.warmup_epochs, "no epoch with the budget"
        assert config.warmup_epochs in (0, *config.optim.drops)  # the first drop is where the warm-up ends
    elif words[0] in COMMANDS and words[0] not in ("train", "bench"):
        assert main([words[0], "--help"]) == 0
        options = {word for word in words if re.fullmatch(r"--[\w-]+", word)}
        assert options <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_example_of_the_help_is_a_command_with_two_phases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS["train"][1](["--help"]) == 0
    (line,) = re.findall(r"^  mwpb-fast (train .*--.*)", capsys.readouterr().out, re.MULTILINE)
    test_commands_are_commands(line, monkeypatch, capsys)


def test_yaml_of_the_guide_is_taken_and_has_two_phases() -> None:
    block = re.search(r"^In YAML, the same:\n\n((?: {4}.*\n)+)", TEXTS, re.MULTILINE)
    assert block
    config = configure("table1.mwpb_at", {Path("guide"): yaml.safe_load(block[1])}, [])
    assert (config.epochs, config.warmup_epochs, config.optim.drops) == (55, 40, (40, 45))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
