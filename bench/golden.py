"""Whether a change has left every number as it was: `make golden BASE=REV`, for refactors.

Every objective, budget, attack and weight perturbation is trained for a few steps on the embedded digits, in every
combination that is not refused and on both engines; every recipe is resolved; runs are attacked. That is done by
the revision REV and by this checkout, side by side on the same machine, with one thread each, and compared to the
bit: losses, radii, the SHA-256 of weights, optimiser and memory, flags. Nothing is stored, as processors round
differently. What differs is printed, and the exit status is then 1.

Modules move and signatures change in a refactor, so both sides are talked to through what stays: the command line,
the names of the axes' modules, and the files of a run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from golden_cases import Record, record

ROOT = Path(__file__).resolve().parents[1]


# two trees -------------------------------------------------------------------------------------------------------
def compare(base: Record, here: Record) -> tuple[list[str], list[str]]:
    """Lines on what differs, and on what is new; the words of a refusal may change, and options may be added."""
    differing, new = [], [f"{name}: new" for name in sorted(set(here) - set(base))]
    for name, before in base.items():
        now = here.get(name)
        if now is None:
            differing.append(f"{name}: gone")
            continue
        for key, value in before.items():
            if key != "said" and now.get(key) != value:
                differing.append(f"{name}: {key}: {short(value)} -> {short(now.get(key, 'gone'))}")
        added = sorted(set(now) - set(before) - {"said"})
        new += [f"{name}: {key}: new, {short(now[key])}" for key in added]
    return differing, new


def holes(done: Record) -> list[str]:
    """What no case has run: modules refused in all combinations, recipes and evaluations that were refused."""
    ran: dict[str, bool] = {}
    for name, entry in done.items():
        kind, *parts = name.split("/")
        for place, part in enumerate(parts):
            key = f"{kind} {place} {part}" if kind == "train" else name
            ran[key] = ran.get(key, False) or entry["status"] == 0
    return [f"{key}: in no case that runs" for key, good in ran.items() if not good]


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 90 else text[:87] + "..."


def git(*words: str, root: Path = ROOT) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True)


def export(revision: str, folder: Path, root: Path = ROOT) -> None:
    """The files of a revision in `folder`, with a native library; LookupError where there is no such revision."""
    packed = git("archive", "--format=tar", revision, root=root)
    if packed.returncode:
        raise LookupError(f"no revision {revision!r} here: {packed.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        # Python before 3.11.4 has no filters, and later ones warn where none is named.
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safely)
    built = sorted((root / "kernels" / "mwpb_kernels").glob("libmwpb_*.so"))
    if not built:  # both sides then run the reference
        return
    package = folder / "kernels" / "mwpb_kernels"
    made_of = ("kernels/csrc", "kernels/CMakeLists.txt", "CMakeLists.txt")
    if not git("diff", "--quiet", revision, "--", *made_of, root=root).returncode:
        for library in built:
            shutil.copy(library, package)
        return
    import torch

    scripts = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=os.pathsep.join([scripts, os.environ.get("PATH", "")])) or "cmake"
    level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    about = [f"-DMWPB_TORCH={Path(torch.__file__).parent}", f"-DMWPB_OUTPUT={package}"]
    build = folder / "build"
    for command in (
        [cmake, "-S", str(folder), "-B", str(build), *about],
        [cmake, "--build", str(build), "--parallel", "2", "--target", f"mwpb_{level}"],
    ):
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"the native library of {revision} cannot be built: {done.stderr.strip()[-300:]}")


def start(tree: Path, output: Path, pattern: str) -> subprocess.Popen[bytes]:
    """A process that records what the packages of `tree` do, to `output`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MWPB_")}
    env |= {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")]), "OMP_NUM_THREADS": "1"}
    words = ["--record", str(output), "--tree", str(tree), "--only", pattern]
    return subprocess.Popen([sys.executable, str(Path(__file__)), *words], env=env, cwd=output.parent)


def both(trees: Sequence[Path], pattern: str) -> list[Record]:
    """What the trees record, side by side. Raises RuntimeError where one could not."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        outputs = [Path(folder) / f"{number}.json" for number in range(len(trees))]
        processes = [start(tree, output, pattern) for tree, output in zip(trees, outputs, strict=True)]
        try:
            for process, tree in zip(processes, trees, strict=True):
                if process.wait():
                    raise RuntimeError(f"the recorder failed in {tree}, with exit status {process.returncode}")
        finally:
            for process in processes:
                process.kill()
        return [json.loads(output.read_bytes()) for output in outputs]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", metavar="REV", help="the revision to compare this checkout with")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases, such as 'train/at/*' or 'recipe/*'")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.record:
        import mwpb_kernels

        import mwpb_fast

        for package in (mwpb_fast, mwpb_kernels):  # an installed copy must not stand in for the tree
            assert Path(str(package.__file__)).is_relative_to(given.tree), (
                f"{package.__file__} is not of {given.tree}"
            )
        given.record.write_bytes(json.dumps(record(given.only)).encode())
        return 0
    if not given.base:
        parser.error("which revision? make golden BASE=REV")
    with tempfile.TemporaryDirectory(prefix="golden-base-") as folder:
        try:
            export(given.base, Path(folder))
            base, here = both([Path(folder), ROOT], given.only)
        except (LookupError, RuntimeError) as error:
            print(f"golden: {error}", file=sys.stderr)
            return 2 if isinstance(error, LookupError) else 1
    differing, new = compare(base, here)
    missed = holes(here) if given.only == "*" else []
    for line in (*new, *differing, *missed):
        print(line)
    refused = sum(entry["status"] == 2 for entry in base.values())
    print(f"{len(base)} cases, {refused} of them refused; {len(differing)} differences from {given.base}")
    return 1 if differing or missed else 0


if __name__ == "__main__":
    sys.exit(main())
