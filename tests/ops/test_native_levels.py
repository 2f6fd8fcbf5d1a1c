"""The native library for every level of processors that this one can run: its values, and under the sanitizers.

The op tests run in a child process each time, as PyTorch and the library choose the level once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mwpb_kernels
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000), pytest.mark.unpoisoned]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(mwpb_kernels.__file__).parent
LIBRARIES = {"DEFAULT": "baseline", "AVX2": "avx2", "AVX512": "avx512"}
ORDER = list(LIBRARIES)
HERE = torch.backends.cpu.get_cpu_capability()
LEVELS = ORDER[: ORDER.index(HERE) + 1] if HERE in ORDER else ["DEFAULT"]
TESTS = ("test_parity.py", "test_fuzz.py")


def package(folder: Path) -> Path:
    """A copy of the package without libraries, and a Triton that cannot be imported: its tests are elsewhere."""
    shutil.copytree(PACKAGE, folder / "mwpb_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text("raise ImportError('not wanted here')\n")
    return folder / "mwpb_kernels"


def op_tests(folder: Path, level: str, **environment: str) -> None:
    """Run the op tests on the package in `folder` at a processor level."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MWPB_", "TRITON_", "PYTEST_"))}
    env |= {"PYTHONPATH": str(folder), "ATEN_CPU_CAPABILITY": level.lower(), "PYTHONDONTWRITEBYTECODE": "1"}
    used = "import mwpb_kernels as k; print(k.native_library, k.__file__, k.implementation('margin'))"
    done = subprocess.run(
        [sys.executable, "-c", used], env=env | environment, capture_output=True, text=True, cwd=folder
    )
    expected = [f"libmwpb_{LIBRARIES[level]}.so", str(folder / "mwpb_kernels" / "__init__.py"), "native"]
    assert done.stdout.split() == expected, done.stderr
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "--timeout=0",
    ]
    command += [str(Path(__file__).with_name(name)) for name in TESTS]
    done = subprocess.run(command, env=env | environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("level", LEVELS)
def test_values(level: str, tmp_path: Path) -> None:
    library = PACKAGE / f"libmwpb_{LIBRARIES[level]}.so"
    if not library.exists():
        pytest.skip(f"{library.name} is not built")
    shutil.copy(library, package(tmp_path))
    op_tests(tmp_path, level)


@pytest.fixture(scope="module")
def runtimes() -> str:
    """The sanitizers' libraries, to be loaded before everything else in a process that was built without them."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++, whose sanitizers are used")
    found = []
    for name in ("libasan.so", "libubsan.so"):
        asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(asked.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        found.append(str(path.resolve()))
    return ":".join(found)


@pytest.mark.parametrize("level", LEVELS)
def test_under_the_sanitizers(level: str, runtimes: str, tmp_path: Path) -> None:
    """No access outside of what is allocated or after its release, no undefined behaviour: each ends a run."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("no cmake")
    build, torch_folder = tmp_path / "build", Path(torch.__file__).parent
    configure = [cmake, "-S", ROOT, "-B", build, f"-DMWPB_TORCH={torch_folder}", "-DMWPB_SANITIZE=ON"]
    for command in (
        [*configure, f"-DMWPB_OUTPUT={package(tmp_path)}"],
        [cmake, "--build", build, "--parallel", "2", "--target", f"mwpb_{LIBRARIES[level]}"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    op_tests(
        tmp_path,
        level,
        LD_PRELOAD=runtimes,
        ASAN_OPTIONS="detect_leaks=0",  # Python keeps what it allocates until it ends
        UBSAN_OPTIONS="print_stacktrace=1",
    )
