"""CONTRIBUTING.md, followed to the letter in a copy of the repository: its files, its changes, its commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
LISTS = [title for title in SECTIONS if title not in ("Set up", "Floors, and why")]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^ {7}((?:pytest|mwpb-fast|python) .*)$", re.MULTILINE)
COPIED = ("mwpb_fast", "kernels", "bench", "tests", "docs", "pyproject.toml", "README.md", "CMakeLists.txt")
QUICKEST = tuple(
    f"tests/{name}.py"
    for name in ("test_registry", "test_by_name", "test_repository", "test_recipes", "ops/test_rows")
)
RUN = (
    "import shlex, sys, mwpb_fast.cli as c\nfor line in sys.argv[1:]: assert c.main(shlex.split(line)) == 0, line"
)


def write(folder: Path, block: str) -> None:
    """A block's first line names its file."""
    name = block.partition("\n")[0].lstrip("#/ ")
    assert not (folder / name).exists(), f"{name} is there already"
    (folder / name).write_text(block.partition("\n")[2], encoding="utf-8")


def change(folder: Path, block: str) -> None:
    """What stood in the file that is named is there once, and is replaced; `@@` begins another place."""
    name, _, hunks = block.removeprefix("--- ").partition("\n")
    text = (folder / name).read_text(encoding="utf-8")
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        assert text.count(before) == 1, f"{name} does not hold once: {before}"
        text = text.replace(before, "".join(line[1:] for line in lines if line[0] != "-"))
    (folder / name).write_text(text, encoding="utf-8")


def commands(title: str, program: str) -> list[str]:
    found = [line for line in COMMAND.findall(SECTIONS[title]) if line.split()[0] == program]
    return [line.partition("#")[0].strip() for line in found]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is needed of the repository, without the native ops, with everything on the page added."""
    folder = tmp_path_factory.mktemp("copy")
    without = shutil.ignore_patterns("__pycache__", "*.so", "build", ".*_cache")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=without)
        else:
            shutil.copy(ROOT / name, folder / name)
    for _, language, block in BLOCK.findall(PAGE):
        (change if language == "diff" else write)(folder, textwrap.dedent(block))
    return folder


def call(folder: Path, *words: str, **environment: str) -> str:
    """Run Python in the copy."""
    env = os.environ | {"MWPB_QUIET": "1"} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder / "kernels")])
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_tests(folder: Path, *options: str, among: tuple[str, ...] = ()) -> str:
    """Run the page's pytest lines at once: all that one of their words selects, in their files, or in `among`."""
    lines = [shlex.split(line) for title in LISTS for line in commands(title, "pytest")]
    assert {line[-2] for line in lines} == {"-k"}
    places = among or dict.fromkeys(word for line in lines for word in line[1:-2])
    words = " or ".join(line[-1] for line in lines)
    return call(folder, "-m", "pytest", "-q", *places, "-k", words, "-p", "no:cacheprovider", *options)


@pytest.fixture(scope="module")
def found(copy: Path) -> list[str]:
    """The tests that the page's pytest lines come to, as file::name."""
    return [line for line in run_tests(copy, "--collect-only").splitlines() if "::" in line]


def test_the_lists_are_those_that_are_promised() -> None:
    kinds = ("op", "objective", "attack", "budget", "model", "data set", "recipe", "bench row")
    assert [title.split(" ", 1)[1] for title in LISTS] == list(kinds)
    for title in LISTS:
        assert re.findall(r"^(\d)\. ", SECTIONS[title], re.MULTILINE)[:2] == ["1", "2"]


@pytest.mark.parametrize("title", [title for title in LISTS if commands(title, "pytest")])
def test_the_tests_find_what_the_list_adds(title: str, found: list[str]) -> None:
    for line in commands(title, "pytest"):
        *places, _, word = shlex.split(line)[1:]
        for place in places:
            assert any(test.startswith(place) and word in test.partition("::")[2] for test in found), place


def test_what_the_lists_add_passes_the_quickest_tests(copy: Path) -> None:
    said = run_tests(copy, among=QUICKEST)
    assert int(re.findall(r"(\d+) passed", said)[-1]) > 20


@pytest.mark.slow
@pytest.mark.timeout(7200)  # however busy the machine
def test_what_the_lists_add_passes_the_tests(copy: Path) -> None:
    run_tests(copy)


def test_the_commands_take_what_the_lists_add(copy: Path) -> None:
    lines = [line.removeprefix("mwpb-fast ") for title in LISTS for line in commands(title, "mwpb-fast")]
    said = call(copy, "-c", RUN, *lines)
    assert len(list((copy / "runs").glob("*/radii.json"))) == sum(line.startswith("train") for line in lines) == 6
    assert "Stripes, horizontal or vertical" in said
    assert "quick.mwpb_at" in said


@pytest.mark.slow
@pytest.mark.timeout(7200)  # however busy the machine
def test_the_benchmarks_have_the_rows(copy: Path) -> None:
    for title in LISTS:
        for line in commands(title, "python"):
            said = call(copy, *shlex.split(line)[1:])
            assert "confidence" in said or "kernels" not in line
    table = (copy / "docs" / "performance.md").read_text(encoding="utf-8").partition("table: shortest")[2]
    assert "| shortest, as used |" in table


def test_the_code_is_in_style(copy: Path) -> None:
    call(copy, "-m", "ruff", "check", "--no-cache", ".")
    call(copy, "-m", "ruff", "format", "--no-cache", "--check", ".")


@pytest.mark.slow
@pytest.mark.timeout(7200)  # however busy the machine
def test_the_code_has_types(copy: Path) -> None:
    call(copy, "-m", "mypy", "--cache-dir=/dev/null")


@pytest.mark.slow
@pytest.mark.timeout(7200)  # however busy the machine
@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="no compiler")
def test_the_native_op_is_built_and_right(copy: Path) -> None:
    import torch

    folder, build = copy / "kernels" / "mwpb_kernels", copy / "build"
    options = [f"-DMWPB_TORCH={Path(torch.__file__).parent}", f"-DMWPB_OUTPUT={folder}"]
    for words in (["-S", copy, "-B", build, *options], ["--build", build, "--target", "mwpb_baseline"]):
        subprocess.run(["cmake", *words], check=True, capture_output=True)
    _, line = commands("An op", "pytest")  # the first, which is quicker, is part of it
    call(copy, "-m", *shlex.split(line), "-p", "no:cacheprovider", ATEN_CPU_CAPABILITY="default")
