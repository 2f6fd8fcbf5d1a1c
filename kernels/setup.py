"""The native build, and the tag of the wheel; everything else is in pyproject.toml."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MARKER = "no_native.txt"  # beside the package's modules, where it looks for why there is no library


class NoNativeError(Exception):
    """Why no library can be built, in one line."""


class BuildPackages(build_py):
    """A wheel holds what the sources hold now, and nothing that an earlier build has left behind."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class OneWheel(bdist_wheel):
    """One wheel for every CPython, free-threaded ones too: the library uses PyTorch's stable ABI, not Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BuildNative(build_ext):
    """Builds the CPU ops with CMake. What is missing costs speed, never the installation."""

    def finalize_options(self) -> None:
        # One folder for editable installs and wheels: what one has compiled, the other links.
        self.build_temp = self.build_temp or str(ROOT / "build" / "native")
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        self.package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "mwpb_kernels"
        self.package.mkdir(parents=True, exist_ok=True)
        (self.package / MARKER).unlink(missing_ok=True)
        try:
            self.build_native()
        except (NoNativeError, OSError) as error:
            for path in self.package.glob("libmwpb_*.so"):  # of other sources, another compiler or another PyTorch
                path.unlink()
            (self.package / MARKER).write_text(f"{error}\n", encoding="utf-8")
            self.extensions = []
            say(f"mwpb-kernels: no native CPU ops: {error}. They run as plain PyTorch, several times slower.")

    def build_native(self) -> None:
        torch = importlib.util.find_spec("torch")
        if not (torch and torch.submodule_search_locations):
            raise NoNativeError("PyTorch was not there where mwpb-kernels was built; it goes first, and then "
                                "pip install --no-build-isolation")  # fmt: skip
        scripts = str(Path(sys.executable).parent)
        cmake = shutil.which("cmake", path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
        if cmake is None:
            raise NoNativeError("CMake was not found when mwpb-kernels was installed (pip install cmake ninja)")
        tools = [str(ROOT), cmake, compiler(), next(iter(torch.submodule_search_locations))]
        ninja = shutil.which("ninja", path=scripts) or shutil.which("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        build = Path(self.build_temp).resolve()
        fresh(build, "\n".join([*tools, str(ninja)]))
        configure = [cmake, *generator, "-S", str(ROOT), "-B", str(build)]
        logged("CMake failed", [*configure, f"-DMWPB_TORCH={tools[-1]}", f"-DMWPB_OUTPUT={self.package}"])
        jobs = str(os.cpu_count() or 1)
        logged("the compilation failed", [cmake, "--build", str(build), "--parallel", jobs])

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "mwpb_kernels"
        return [str(path) for path in (*package.glob("libmwpb_*.so"), *package.glob(MARKER))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def compiler() -> str:
    """The C++ compiler that CMake will take."""
    named = os.environ.get("CXX", "").strip()
    if named:
        found = shutil.which(shlex.split(named)[0])
        if found is None:
            raise NoNativeError(f"the environment names CXX={named}, and there is no such compiler")
        return f"{named} {found}"
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise NoNativeError("no C++ compiler was found when mwpb-kernels was installed")
    return found


def fresh(build: Path, tools: str) -> None:
    """Leave the build folder empty unless it was made with these tools: CMake keeps to those that it found."""
    stamp = build / "tools.txt"
    if not (stamp.exists() and stamp.read_text(encoding="utf-8") == tools):
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        stamp.write_text(tools, encoding="utf-8")


def logged(failure: str, command: list[str]) -> None:
    """Run a command; its output is for `pip install -v`, its first error for the message."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    print(done.stdout)
    if done.returncode:
        lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
        after = first + 1 + (lines[first].endswith(":") if lines else 0)  # CMake says where, and then what
        raise NoNativeError(f"{failure} when mwpb-kernels was installed: {' '.join(lines[first:after])}")


def say(line: str) -> None:
    """A line for whoever installs: pip hides the output of a build that succeeds, but not the terminal."""
    print(line, file=sys.stderr)
    with contextlib.suppress(OSError), open("/dev/tty", "w", encoding="utf-8") as terminal:
        if not sys.stderr.isatty():
            terminal.write(f"\n{line}\n")


setup(
    packages=["mwpb_kernels"],
    package_data={"mwpb_kernels": ["py.typed"]},
    ext_modules=[Extension("mwpb_kernels.native", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackages, "bdist_wheel": OneWheel},
)
