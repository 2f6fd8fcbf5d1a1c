"""The recorder that refactors are held to: the same revision gives the same bits, and a change is noticed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
golden: Any = importlib.import_module("golden")
cases: Any = importlib.import_module("golden_cases")
ROOT = golden.ROOT
CASE = "train/at/margin/pgd/none/eager"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of this checkout, in a repository of their own."""
    folder = tmp_path_factory.mktemp("golden")
    archive = subprocess.run(
        [
            "tar",
            "-C",
            str(ROOT),
            "--exclude=__pycache__",
            "--exclude=build",
            "-c",
            "mwpb_fast",
            "kernels",
            "CMakeLists.txt",
        ],
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "-C", str(folder), "-x"], input=archive.stdout, check=True)
    (folder / ".gitignore").write_text("*.so\n")
    author = ["-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "one"]):
        assert golden.git(*words, root=folder).returncode == 0
    return folder


def test_the_same_revision_is_the_same_and_a_change_is_noticed(tree: Path, tmp_path: Path) -> None:
    golden.export("HEAD", tmp_path, root=tree)
    assert {p.name for p in (tmp_path / "kernels/mwpb_kernels").glob("*.so")} == {
        p.name for p in (tree / "kernels/mwpb_kernels").glob("*.so")
    }
    changed = tmp_path / "changed"
    golden.export("HEAD", changed, root=tree)
    source = changed / "mwpb_fast" / "optim.py"
    text = source.read_text()
    assert text.count("momentum=config.momentum") >= 1
    source.write_text(text.replace("momentum=config.momentum", "momentum=config.momentum * 0.999"))
    base, here, other = golden.both([tmp_path, tree, changed], CASE)
    assert list(base) == [CASE]
    entry = base[CASE]
    assert entry["status"] == 0
    assert len(entry["loss"]) == 3
    assert float.fromhex(entry["loss"][0]) == pytest.approx(2.3, abs=0.5)
    assert golden.compare(base, here) == ([], [])
    differing, new = golden.compare(base, other)
    assert not new
    named = {line.split(": ")[1] for line in differing}
    assert named >= {"loss", "model", "best", "optimizer"}
    assert not named & {"status", "learning_rate", "bad_steps"}


def test_every_axis_and_recipe_is_a_case() -> None:
    from mwpb_fast import config

    names = [name for name, _ in cases.cases()]
    assert len(set(names)) == len(names)
    parts = {part for name in names for part in name.split("/")}
    for kind in cases.AXES.values():
        for module in config.names(kind):
            assert (module in parts) == hasattr(config.load(kind, module), "Config")
    assert {f"recipe/{name}" for name in config.all_recipes()} < set(names)
    # what begins late by default begins within the three epochs
    late = [option for found in cases.axes().values() for _, options in found for option in options]
    assert late
    assert all(option.endswith("_epochs=1") for option in late)


def test_what_is_compared() -> None:
    base = {"a": {"status": 0, "loss": ["0x1p0"]}, "b": {"status": 2, "said": "no"}, "c": {"status": 0}}
    here = {"a": {"status": 0, "loss": ["0x1p0"], "option": "1"}, "b": {"status": 2, "said": "never"}}
    assert golden.compare(base, base) == ([], [])
    assert golden.compare(base, here) == (["c: gone"], ["a: option: new, 1"])
    assert golden.compare(base, {**base, "d": {"status": 0}}) == ([], ["d: new"])
    here = {**base, "a": {"status": 0, "loss": ["0x1.8p0"]}, "b": {"status": 0}}
    assert golden.compare(base, here) == (["a: loss: ['0x1p0'] -> ['0x1.8p0']", "b: status: 2 -> 0"], [])


def test_what_no_case_has_run_is_told() -> None:
    good, bad = {"status": 0}, {"status": 2}
    done = {"train/at/pgd": good, "train/at/anpgd": bad, "train/mma/pgd": bad, "train/mma/anpgd": good}
    assert golden.holes(done | {"recipe/small.at": good, "evaluate/eager": good}) == []
    told = golden.holes(done | {"train/new/pgd": bad, "recipe/small.at": bad})
    assert told == ["train 0 new: in no case that runs", "recipe/small.at: in no case that runs"]


def test_what_is_refused_by_default_runs_with_what_it_needs(tmp_path: Path) -> None:
    """The recipes too: an entry for each value."""
    found = dict(cases.cases())
    entry = found["train/gairat/fixed/pgd/none/eager"](tmp_path / "a")
    assert (entry["status"], entry["with"]) == (0, "--attack.count_correct=true")
    entry = found["recipe/table1.mwpb_at"](tmp_path / "b")
    assert (entry["status"], entry["budget.alpha"], entry["optim.lr"]) == (0, "0.58", "0.1")


def test_an_unknown_revision_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(["no-such-revision"]) == 2
    assert "golden: no revision 'no-such-revision' here" in capsys.readouterr().err
