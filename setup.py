"""Package folders and the native build; everything else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class BuildNative(build_ext):
    """Builds the CPU ops with CMake. What is missing costs speed, never the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        try:
            self.build_native()
        except (OSError, subprocess.CalledProcessError, LookupError) as error:
            print(f"mwpb-fast: no native CPU ops ({error}); they run as plain PyTorch, several times slower")
            self.extensions = []

    def build_native(self) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            raise LookupError("torch is not installed where the build runs; use --no-build-isolation")
        scripts = str(Path(sys.executable).parent)
        cmake = shutil.which("cmake", path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
        if cmake is None:
            raise LookupError("CMake was not found")
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            raise LookupError("no C++ compiler was found")
        package = ROOT / "kernels" if self.inplace else Path(self.build_lib).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja", path=scripts) or shutil.which("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        subprocess.run(
            [
                cmake,
                *generator,
                "-S",
                str(ROOT),
                "-B",
                str(build),
                f"-DMWPB_TORCH={next(iter(torch.submodule_search_locations))}",
                f"-DMWPB_OUTPUT={package / 'mwpb_kernels'}",
            ],
            check=True,
        )
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "mwpb_kernels").glob("libmwpb_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


trainer = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("mwpb_fast/**/__init__.py"))
setup(
    packages=["mwpb_kernels", *(str(folder).replace(os.sep, ".") for folder in trainer)],
    package_dir={"mwpb_kernels": "kernels/mwpb_kernels", "mwpb_fast": "mwpb_fast"},
    ext_modules=[Extension("mwpb_kernels.native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
