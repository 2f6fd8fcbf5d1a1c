"""The examples run as they stand, small; each is short, timed beside plain PyTorch, and gives what that gives."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import mwpb_kernels
import pytest
import torch

from mwpb_fast import cli
from mwpb_fast.config import ConfigError
from mwpb_fast.options import configure

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHARED = ("beside.py", "plain.py")  # by the others
WITHOUT = importlib.util.find_spec("lightning") is None
MARKS = {
    "compiled.py": [pytest.mark.slow],  # a compiler runs
    "lightning_module.py": [  # its import takes seconds
        pytest.mark.slow,
        pytest.mark.skipif(WITHOUT, reason="not installed: lightning (requirements/peers.lock has it)"),
    ],
}
SCRIPTS = [
    pytest.param(p, marks=MARKS.get(p.name, ()), id=p.name)
    for p in sorted(EXAMPLES.glob("*.py"))
    if p.name not in SHARED
]
NOTEBOOK = EXAMPLES / "first_look.ipynb"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
TIME = re.compile(r"^(\w[\w, ]*\w) +([\d.]+) ms, ([\d.]+) times as fast$", re.MULTILINE)
SAME = re.compile(r"^the same result: ([\d.]+) % of the numbers agree to within", re.MULTILINE)


def cells() -> list[str]:
    """The notebook's code."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a script in the folder of the examples, with the word that makes it short."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["example", "--small"])
    yield
    mwpb_kernels.OPS.pop("entropy", None)  # that of own/, which tests that look at all ops are not to find


def told(out: str) -> None:
    """Each comparison printed both times, their ratio, and that the results agree."""
    ways, agree = TIME.findall(out), SAME.findall(out)
    firsts = [way for way in ways if way[2] == "1.00"]
    assert len(ways) > len(firsts) >= 1
    assert len(agree) >= 1
    assert all(float(milliseconds) > 0 for _, milliseconds, _ in ways)
    assert all(float(share) >= 99 for share in agree)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_told_of(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    assert (path.name if path.parent == EXAMPLES else path.parent.name) in README


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_runs_beside_the_plain_version(
    path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(path), run_name="__main__")
    told(capsys.readouterr().out)


def test_the_notebook_runs_and_holds_no_outputs(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="not installed: matplotlib (the extra `plots`)").use("agg")
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"], cell["metadata"]) == ([], None, {})
    assert sum(len(cell.splitlines()) for cell in cells()) < 60
    assert NOTEBOOK.name in README
    shared: dict[str, object] = {"__name__": "__main__"}
    for cell in cells():
        exec(compile(cell, NOTEBOOK.name, "exec", dont_inherit=True), shared)
    told(capsys.readouterr().out)
    sys.modules["matplotlib.pyplot"].close("all")


def test_another_result_is_not_the_same(small: None) -> None:
    import beside

    x = torch.zeros(100)
    beside.same(x, x.clone(), within=0)
    for other in (x.index_fill(0, torch.tensor([3]), 1e-3), x / 0):
        with pytest.raises(AssertionError, match="of the numbers agree"):
            beside.same(x, other, within=1e-4)


def test_the_ops_kernel_gives_what_its_reference_does(small: None) -> None:
    pytest.importorskip("triton", reason="not installed: triton")
    from own import entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for (logits,) in entropy.OP.samples(device):
        if logits.dtype != torch.float64 and len(logits):
            torch.testing.assert_close(entropy.OP.triton(logits), entropy.reference(logits))


def test_what_is_added_in_one_file_each_trains(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = re.findall(r"^ {4}mwpb-fast (train .*)$", README, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    config = configure(line.split()[1], {}, ["--budget=own.floored", "--budget.floor=0.75"])
    assert config.budget.floor == 0.75
    with pytest.raises(ConfigError):
        configure(line.split()[1], {}, ["--objective=own.paired", "--natural_pass=true"])
    small = ["--epochs", "2", "--warmup_epochs", "1", "--data.subset", "64", "--no-evaluate", "--quiet"]
    assert cli.main([*line.split(), *small, "--out", "run"]) == 0
    assert (tmp_path / "run" / "radii.json").exists()
