"""Installing: what is missing is said in one line, a slow install with its cause."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
WITHOUT_TOOLS = "import sys; sys.executable = '/nowhere/python'; "
RUN = "import runpy, sys; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
pytest.importorskip("setuptools")


def python(*words: str, cwd: Path = KERNELS, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH")} | environment
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=550,
        stdin=subprocess.DEVNULL,
    )


def copy_sources(folder: Path) -> Path:
    """The files of the repository, and nothing that a build has left."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


# what must be there first -------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["65.5.0", ""])
def test_old_or_absent_setuptools_is_one_line(version: str, tmp_path: Path) -> None:
    if version:
        (tmp_path / "setuptools").mkdir()
        (tmp_path / "setuptools" / "__init__.py").write_text(f"__version__ = {version!r}")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "install")])
    done = python("-S", "-c", "import backend", PYTHONPATH=path)  # -S: no site-packages
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"setuptools 77 or newer is needed, and here is {version or 'none'}" in line
    assert line.endswith("-m pip install 'setuptools>=77' cmake ninja")


def test_the_readme_installs_what_the_backend_asks_for() -> None:
    words = "pip install 'setuptools>=77' cmake ninja"
    assert words in (ROOT / "README.md").read_text()
    for folder in (ROOT, KERNELS):
        assert 'requires = ["setuptools>=77"' in (folder / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["python3.11", "python3.12", "python3.13"])
def test_a_fresh_environment_is_told_what_to_install(name: str, tmp_path: Path) -> None:
    interpreter = shutil.which(name)
    if interpreter is None or subprocess.run([interpreter, "-V"], capture_output=True).returncode:
        pytest.skip(f"no {name} here")
    subprocess.run([interpreter, "-m", "venv", tmp_path / "new"], check=True)
    sources = copy_sources(tmp_path / "sources")
    words = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(
        [tmp_path / "new" / "bin" / "python", *words], cwd=sources, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "mwpb-fast: error" in line]
    assert "setuptools 77 or newer is needed" in line
    assert "Traceback" not in done.stdout + done.stderr


# a slow install -----------------------------------------------------------------------------------------------
def build(tmp_path: Path, prelude: str = "", **environment: str) -> tuple[str, str]:
    """Build the ops into a folder that holds an old library; the cause that was left there, and what was said."""
    package = tmp_path / "lib" / "mwpb_kernels"
    package.mkdir(parents=True)
    (package / "libmwpb_old.so").touch()
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = python("-c", prelude + RUN, "-q", "build_ext", *folders, **environment)
    assert done.returncode == 0, done.stderr
    assert not list(package.glob("*.so"))
    (cause,) = (package / "no_native.txt").read_text().splitlines()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mwpb-kernels: no native CPU ops: ")]
    assert cause in line
    return cause, line


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_named_compiler_that_is_absent(tmp_path: Path) -> None:
    assert build(tmp_path, CXX="/nowhere/g++ -m64")[0] == (
        "the environment names CXX=/nowhere/g++ -m64, and there is no such compiler"
    )


def test_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    cmake = script(tmp_path / "bin" / "cmake", "exit 1")
    assert "no C++ compiler was found" in build(tmp_path, PATH=str(Path(cmake).parent))[0]


def test_no_cmake(tmp_path: Path) -> None:
    assert "CMake was not found" in build(tmp_path, WITHOUT_TOOLS, PATH="/nowhere")[0]


def test_no_pytorch(tmp_path: Path) -> None:
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: n != 'torch' and f(n, *a); "
    assert "PyTorch was not there" in build(tmp_path, hide)[0]


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no CMake or no compiler")
def test_a_compilation_that_fails_names_its_first_error(tmp_path: Path) -> None:
    fails = script(
        tmp_path / "c++", 'case "$*" in *csrc*) echo "linf.cpp:1: error: planted"; exit 1;; esac; exec c++ "$@"'
    )
    cause, _ = build(tmp_path, CXX=fails)
    assert cause == "the compilation failed when mwpb-kernels was installed: linf.cpp:1: error: planted"


@pytest.mark.skipif(not shutil.which("cmake"), reason="no CMake")
def test_a_compiler_that_does_not_work(tmp_path: Path) -> None:
    cause, _ = build(tmp_path, CXX=script(tmp_path / "c++", "exit 1"))
    assert cause.startswith("CMake failed when mwpb-kernels was installed: ")


def test_a_slow_install_is_said_on_the_terminal_that_pip_hides_output_from(tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:  # its output goes where pip would keep it; its terminal is ours
        output = os.open(tmp_path / "kept", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["CXX"] = "/nowhere/g++"
        words = ["-q", "build_ext", "--build-lib", f"{tmp_path}/lib", "--build-temp", f"{tmp_path}/temp"]
        os.chdir(KERNELS)
        os.execv(sys.executable, [sys.executable, "-c", RUN, *words])
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert os.waitpid(child, 0)[1] == 0, (tmp_path / "kept").read_text()
    assert shown.count(b"mwpb-kernels: no native CPU ops: the environment names CXX=/nowhere/g++") == 1
