"""Optional packages that are missing or broken: told apart, and no run ends but one that needs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mwpb_fast.system.optional import Attempt, attempt, version_of
from mwpb_fast.system.signals import Interrupted

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "raise TypeError('Descriptors cannot\\n be created.')": "TypeError: Descriptors cannot be created.",
    "raise ImportError('x.so: undefined symbol')": "ImportError: x.so: undefined symbol",
    "raise AttributeError": "AttributeError",
    "raise OSError('no such library')": "OSError: no such library",
    "raise SystemExit(3)": "SystemExit: 3",
    "import surely_not_there": "ModuleNotFoundError: No module named 'surely_not_there'",
    "def": "SyntaxError: invalid syntax (__init__.py, line 1)",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_one", raising=False)
    (tmp_path / "broken_one").mkdir()
    return tmp_path / "broken_one" / "__init__.py"


@pytest.mark.parametrize("text", KINDS)
def test_what_is_broken_is_told_and_not_raised(text: str, package: Path) -> None:
    package.write_text(text)
    found = attempt("broken_one")
    assert found == Attempt(None, f"does not import ({KINDS[text]})", broken=True)
    assert found.cure("broken-one", "extra") == "pip install --force-reinstall --no-deps broken-one"


def test_missing_is_not_broken(package: Path) -> None:
    for names in (["surely_not_there"], ["surely_not_there.part"], ["broken_one"]):  # the last is a mere folder
        assert attempt(*names) == Attempt(None, "is not installed"), names
    assert attempt("surely_not_there").cure("it", "extra") == "pip install 'mwpb-fast[extra]'"
    assert attempt("surely_not_there").cure("it") == "pip install it"
    package.write_text("")
    sys.modules.pop("broken_one")
    found = attempt("broken_one", "broken_one.part")  # half of it was removed
    assert found.broken
    assert "No module named 'broken_one.part'" in found.why
    assert attempt("broken_one").module is sys.modules["broken_one"]
    assert version_of("surely-not-there") is None


@pytest.mark.parametrize("error", [Interrupted(15), KeyboardInterrupt()])
def test_an_interruption_is_no_broken_package(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(name: str) -> None:
        raise error

    monkeypatch.setattr("importlib.import_module", stop)
    with pytest.raises(type(error)):
        attempt("anything")


# One process in which every optional package is broken, in every way by turns. Triton's turns are in
# tests/ops/test_environments.py; here it is broken in the first way.
BROKEN = """
import contextlib, io, json, pathlib, sys
MESSAGE = "Descriptors cannot\\n be created."
KINDS = [TypeError(MESSAGE), ImportError("b"), AttributeError("c"), OSError("d"), SystemExit(3)]
PACKAGES = ("triton", "tensorboard", "matplotlib", "huggingface_hub", "nvidia.dali", "pyautoattack", "apex",
            "cudnn")
class Break:
    def find_spec(self, name, path=None, target=None):
        if name in PACKAGES:
            raise kind
sys.meta_path.insert(0, Break())
kind = KINDS[0]
from mwpb_fast import cli, optim
from mwpb_fast.runs import plots
from mwpb_fast.evaluation import autoattack
from mwpb_fast.data import dali
from mwpb_fast.runs.log import RunLog

def told(name, call, *words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = call(*words)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    print(json.dumps([type(kind).__name__, name, str(result), err.getvalue(), out.getvalue()]), flush=True)

TRAIN = ["train", "digits.mwpb_at", "--epochs", "1", "--warmup_epochs", "0", "--optim.drops", "[]",
         "--data.subset", "64", "--evaluation.subset", "5", "--out", "run"]
told("run", cli.main, [*TRAIN, "--evaluation.attacks", "natural"])
told("aa", cli.main, [*TRAIN, "--evaluation.attacks", "aa"])
told("doctor", cli.main, ["doctor", "--json"])
for kind in KINDS:
    told("pyautoattack", autoattack.package_version)
    told("NVIDIA DALI", dali._require_dali)
    told("NVIDIA apex", optim.apex_fused_sgd, [])
    told("matplotlib", plots.require_matplotlib)
    told("TensorBoard", RunLog, pathlib.Path("run"), 1)
"""


def test_broken_packages_end_only_what_needs_them(tmp_path: Path) -> None:
    done = command("-c", BROKEN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    (_, _, status, err, _), (_, _, other, needs, _), (_, _, _, _, report), *parts = calls
    assert (status, [line.partition(" does not import")[0] for line in err.splitlines()]) == (
        "0",
        ["mwpb-fast: TensorBoard", "mwpb-fast: plots need matplotlib, which"],
    )
    assert other == "2"
    assert needs.startswith(
        "mwpb-fast: error: AutoAttack and its parts need pyautoattack, which does not import (Ty"
    )
    assert len(needs.splitlines()) == 1
    found = {finding["name"]: finding for finding in json.loads(report)["findings"]}
    optional = ("tensorboard", "matplotlib", "huggingface_hub", "dali", "pyautoattack", "apex", "cudnn")
    for package in ("triton", *optional):
        assert found[package]["status"] == "broken", package
        assert "does not import (TypeError: Descriptors cannot be created.)" in found[package]["detail"]
    assert len(parts) == 5 * 5
    for kind, package, result, err, _ in parts:
        text = err if package == "TensorBoard" else result
        assert f"{package}" in text
        assert f" does not import ({kind}: " in text
        refused = "DataError" if package == "NVIDIA DALI" else "ConfigError"
        assert result.startswith(refused) or package == "TensorBoard"
    assert {kind for kind, *_ in parts} == {"TypeError", "ImportError", "AttributeError", "OSError", "SystemExit"}


# the command itself -------------------------------------------------------------------------------------------
def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    return subprocess.run([sys.executable, *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_python_m_is_the_command_even_among_modules_named_like_dependencies(tmp_path: Path) -> None:
    for name in ("yaml", "numpy", "torch", "rich", "triton", "json"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the one of the current folder')")
    for name in ("data", "bench", "mwpb_fast", "matplotlib"):
        (tmp_path / name).mkdir()
    for words in (["-V"], ["--version"]):
        done = command("-P", "-m", "mwpb_fast", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("mwpb-fast 0.")
    done = command("-P", "-m", "mwpb_fast", "recipes", cwd=tmp_path)
    assert "digits.mwpb_at" in done.stdout, done.stderr


def test_python_m_puts_the_current_folder_last(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise RuntimeError('the one of the current folder')")
    (tmp_path / "a.yaml").write_text("epochs: 1\n")
    done = command("-m", "mwpb_fast", "train", "digits.at", "--config", "a.yaml", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("-m", "mwpb_fast", "nonsense", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mwpb-fast: error: no command 'nonsense'")


def test_a_checkout_that_is_not_installed_says_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from mwpb_fast.runs import log

    monkeypatch.setattr(log, "version_of", lambda name: None)
    project = (ROOT / "pyproject.toml").read_text()
    number = project.partition('\nversion = "')[2].partition('"')[0]
    assert log.own_version() == f"{number}, not installed"
