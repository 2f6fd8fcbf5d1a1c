"""The distributions of the ops and of the trainer: what is in them, what they ask for, and that they install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from test_install import KERNELS, ROOT, copy_sources, python

SITE = sysconfig.get_paths()["purelib"]
TRY = {f"install/{name}.py" for name in ("try_ops", "try_trainer", "wheels")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources with a space"))


def test_what_each_distribution_has_of_its_own_is_the_same() -> None:
    """A source distribution holds nothing from outside of its folder."""
    for name in ("LICENSE", "install/backend.py"):
        assert (ROOT / name).read_text() == (KERNELS / name).read_text()
    versions = {
        re.search(r'^version(?: = |: )"?([0-9.]+)', (ROOT / name).read_text(), re.MULTILINE)[1]  # type: ignore[index]
        for name in ("pyproject.toml", "kernels/pyproject.toml", "CITATION.cff")
    }
    assert len(versions) == 1


def backend(call: str, folder: Path, **environment: str) -> None:
    done = python("-c", f"import backend; backend.{call}", cwd=folder, **{"PYTHONPATH": "install"} | environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sdists(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source distributions of the ops and of the trainer, by their packages' names."""
    for leftover in ("libmwpb_avx2.so", "no_native.txt", "build/native/a.o", "old.egg-info/SOURCES.txt"):
        path = sources / "kernels" / ("mwpb_kernels" if "/" not in leftover else "") / leftover
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = tmp_path_factory.mktemp("sdists")
    for project in (sources / "kernels", sources):
        backend(f"build_sdist({str(folder)!r})", project)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.tar.gz")}


def names_in(sdist: Path) -> set[str]:
    """The files of a source distribution, but for what setuptools itself adds."""
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    return {name for name in files if ".egg-info" not in name} - {"PKG-INFO", "setup.cfg"}


def unpacked(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return folder / sdist.name.removesuffix(".tar.gz")


def test_a_source_distribution_holds_its_package_and_nothing_else(sdists: dict[str, Path], sources: Path) -> None:
    common = {"LICENSE", "MANIFEST.in", "README.md", "install/backend.py", "pyproject.toml", "setup.py"}
    for package, folder, more, suffixes in (
        ("mwpb_kernels", sources / "kernels", {"CMakeLists.txt"}, (".py", ".cpp", ".h", ".typed")),
        ("mwpb_fast", sources, {"CHANGELOG.md", "CITATION.cff", *TRY}, (".py", ".typed")),
    ):
        files = [path for part in (package, "csrc") for path in (folder / part).rglob("*")]
        wanted = {str(path.relative_to(folder)) for path in files if path.suffix in suffixes} | common | more
        assert names_in(sdists[package]) == wanted
        assert {f"{package}/py.typed", f"{package}/__init__.py"} <= wanted
        assert sdists[package].stat().st_size < 2**20


def test_the_trainer_asks_for_the_ops_of_its_version(
    sdists: dict[str, Path], sources: Path, tmp_path: Path
) -> None:
    """In a clone for its own, unless they are there; what is made elsewhere names no folder."""
    folder = unpacked(sdists["mwpb_fast"], tmp_path)
    assert str(sources) not in (folder / "PKG-INFO").read_text()
    version = folder.name.rpartition("-")[2]
    there = f"mwpb-kernels=={version}"
    for project, installed, wanted in (
        (sources, version, there),
        (sources, "0.0.1", f"mwpb-kernels @ {(sources / 'kernels').as_uri()}"),
        (folder, "0.0.1", there),
    ):
        ops, out = tmp_path / installed / "mwpb_kernels.dist-info", tmp_path / installed / project.name
        ops.mkdir(parents=True, exist_ok=True)
        out.mkdir()
        (ops / "METADATA").write_text(f"Name: mwpb-kernels\nVersion: {installed}\n")
        path = os.pathsep.join(["install", str(ops.parent)])
        backend(f"prepare_metadata_for_build_wheel({str(out)!r})", project, PYTHONPATH=path)
        (metadata,) = out.glob("*.dist-info/METADATA")
        assert f"\nRequires-Dist: {wanted}\n" in metadata.read_text()


def test_the_trainers_wheel_is_pure(sdists: dict[str, Path], tmp_path: Path) -> None:
    backend(f"build_wheel({str(tmp_path)!r})", unpacked(sdists["mwpb_fast"], tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mwpb_fast/py.typed", "mwpb_fast/__main__.py"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"mwpb_fast"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_second_wheel_has_nothing_of_the_first(sources: Path, tmp_path: Path) -> None:
    gone = sources / "kernels" / "mwpb_kernels" / "gone.py"
    for number, there in enumerate([True, False]):
        gone.write_text("") if there else gone.unlink()
        backend(f"build_wheel({str(tmp_path / str(number))!r})", sources / "kernels", CXX="/nowhere/g++")
        (wheel,) = (tmp_path / str(number)).glob("*.whl")
        assert "-py3-none-linux_" in wheel.name  # of any CPython, also a free-threaded one
        names = set(zipfile.ZipFile(wheel).namelist())
        assert ("mwpb_kernels/gone.py" in names) == there
        assert {"mwpb_kernels/py.typed", "mwpb_kernels/linf.py"} <= names
        assert "mwpb_kernels/no_native.txt" in names
        assert not [name for name in names if name.endswith(".so")]
        assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(7200)  # it compiles everything, however busy the machine
@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_the_wheels_work_where_nothing_else_is(tmp_path: Path) -> None:
    pytest.importorskip("auditwheel", reason="auditwheel is of requirements/dev.lock")
    words = [sys.executable, "install/wheels.py", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("results as the reference's") >= 1
    assert done.stdout.splitlines()[-1].endswith("help, training, evaluation, report, export")
    kinds = sorted(path.name.partition("-")[0] + path.suffix for path in tmp_path.iterdir())
    assert kinds == ["mwpb_fast.gz", "mwpb_fast.whl", "mwpb_kernels.gz", "mwpb_kernels.whl"]


@pytest.mark.slow
@pytest.mark.timeout(7200)  # it compiles everything, however busy the machine
@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_an_install_from_the_sdist_is_native(sdists: dict[str, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "new", with_pip=True)
    interpreter = tmp_path / "new" / "bin" / "python"
    where = sysconfig.get_path("purelib", "venv", vars={"base": str(tmp_path / "new")})
    (Path(where) / "outer.pth").write_text(SITE)  # PyTorch and the tools, from here
    words = [
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        str(sdists["mwpb_kernels"]),
    ]
    subprocess.run([interpreter, "-m", "pip", "uninstall", "-yq", "setuptools"], check=True)  # 3.11's is too old
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH")}
    subprocess.run([interpreter, *words], check=True, cwd=tmp_path, env=env)
    code = "import mwpb_kernels as k; print(k.__file__, k.native_library, k.native_problem)"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    file, library, *problem = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path), file
    assert (library.startswith("libmwpb_"), problem) == (True, []), done.stderr
