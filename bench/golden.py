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
import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
AXES = {"objective": "objectives", "budget": "budgets", "attack": "attacks", "perturbation": "perturbations"}
ENGINES = ("eager", "twin")
TINY = ("--model.name=smallresnet-8", "--data.name=digits", "--data.validation=0", "--precision.device=cpu",
        "--precision.dtype=fp32", "--no-evaluate", "--quiet")  # fmt: skip
STEPS = (*TINY, "--data.subset=32", "--data.batch_size=32", "--epochs=3", "--warmup_epochs=1")  # a step an epoch
LEARNT = (
    *TINY,
    "--data.subset=600",
    "--data.batch_size=60",
    "--epochs=3",
    "--warmup_epochs=1",
    "--attack.steps=3",
)
ATTACKS = ("natural", "fgsm", "pgd5", "pgd3x2", "cw5", "pgd4@4/255:2/255", "spsa8", "square", "apgd-ce", "apgd-t",
           "fab")  # fmt: skip
Record = dict[str, dict[str, Any]]


# what there is, in the tree that is imported ---------------------------------------------------------------------
def axes() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """By axis, its modules with the options that bring every phase of theirs into the few epochs."""
    from mwpb_fast import config

    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for axis, kind in AXES.items():
        found[axis] = []
        for name in config.names(kind):
            make = getattr(config.load(kind, name), "Config", None)
            if make is not None:
                late = [f.name for f in dataclasses.fields(make) if f.name.endswith("_epochs")]
                short = [f"--{axis}.{n}=1" for n in late if getattr(make(), n) > 1]
                found[axis].append((name, tuple(short)))
    return found


def cases() -> Iterator[tuple[str, Callable[[Path], dict[str, Any]]]]:
    """Every case: its name, and what it records given an empty folder."""
    from mwpb_fast import config

    found = axes()
    for values in itertools.product(*found.values()):
        chosen = dict(zip(found, values, strict=True))
        options = [f"--{axis}={name}" for axis, (name, _) in chosen.items()]
        options += [option for _, short in chosen.values() for option in short]
        for engine in ENGINES:
            name = "train/" + "/".join(n for n, _ in chosen.values()) + f"/{engine}"
            words = ("digits.mwpb_at", *STEPS, *options, f"--precision.engine={engine}")
            yield name, partial(trained, words=words)
    for recipe in config.all_recipes():
        yield f"recipe/{recipe}", partial(resolved, recipe=recipe)
    for engine in ENGINES:
        yield f"evaluate/{engine}", partial(evaluated, engine=engine)


# what is recorded ------------------------------------------------------------------------------------------------
def call(*words: str) -> dict[str, Any]:
    """Run a command of mwpb-fast here: its exit status and, where it is not 0, its last line."""
    from mwpb_fast.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status: int | str = main(list(words))
        except Exception as error:
            status = "crash"
            print(repr(error), file=said)
    if status == 0:
        return {"status": 0}
    return {"status": status, "said": (said.getvalue().strip().splitlines() or [""])[-1]}


def trained(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Train and record the losses, the radii and what the newest checkpoint holds."""
    out = call("train", *words, f"--out={folder}")
    if out["status"] == 0:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("loss", "radius_min", "radius_mean", "radius_max", "learning_rate", "bad_steps"):
            out[name] = exact([line[name] for line in lines])
        out["radii"] = digest(exact(json.loads((folder / "radii.json").read_bytes())["radii"]))
        state = newest(folder, "last")
        out |= {name: digest(state[name]) for name in ("model", "optimizer", "memory")}
        out["best"] = digest(newest(folder, "best")["model"])
    return out


def resolved(folder: Path, recipe: str) -> dict[str, Any]:
    """The configuration that a recipe comes to, an entry a value, but for what the embedded data set takes."""
    import yaml

    out = call("train", recipe, *TINY, "--data.subset=32", "--epochs=0", f"--out={folder}")
    if out["status"] == 0:
        out |= flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    return out


def evaluated(folder: Path, engine: str) -> dict[str, Any]:
    """Train until attacks have something to do, and record which images withstand which attack."""
    out = trained(folder, ("digits.mwpb_at", *LEARNT, f"--precision.engine={engine}"))
    for attack in ATTACKS if out["status"] == 0 else ():
        for path in folder.glob("evaluation-*.json"):
            path.unlink()
        done = call("evaluate", str(folder), "--which=last", "--subset=20", "--eps=12/255", "--attacks", attack)
        out[f"{attack} status"] = done["status"]
        if done["status"] == 0:
            (path,) = folder.glob("evaluation-*.json")
            out[attack] = json.loads(path.read_bytes())["attacks"][attack]["flags"]
    return out


def newest(folder: Path, kind: str) -> dict[str, Any]:
    import torch

    path = sorted(folder.glob(f"checkpoints/{kind}-*.pt"))[-1]
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def exact(values: Sequence[float]) -> list[str]:
    return [float(value).hex() for value in values]


def digest(value: Any) -> str:
    """SHA-256 of nested containers of tensors and plain types, names and values in order of the names."""
    import torch

    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                sha.update(f"{key}:".encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
                sha.update(b",")
        else:
            sha.update(repr(value).encode())

    feed(value)
    return sha.hexdigest()


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Nested mappings as one, with dotted names."""
    out: dict[str, str] = {}
    for key, value in values.items():
        out |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": repr(value)}
    return out


def record(pattern: str) -> Record:
    """All cases whose names match, of the tree that is imported."""
    for module in ("matplotlib", "tensorboard"):  # optional, and most of the time of such short runs
        sys.modules[module] = None  # type: ignore[assignment]
    import torch

    torch.set_num_threads(1)
    done: Record = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        for number, (name, make) in enumerate(cases()):
            if fnmatch.fnmatch(name, pattern):
                done[name] = make(Path(folder) / str(number))
                shutil.rmtree(Path(folder) / str(number), ignore_errors=True)
    return done


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
        archive.extractall(folder, filter="data")
    built = sorted((root / "kernels" / "mwpb_kernels").glob("libmwpb_*.so"))
    if not built:  # both sides then run the reference
        return
    package = folder / "kernels" / "mwpb_kernels"
    if not git("diff", "--quiet", revision, "--", "kernels/csrc", "CMakeLists.txt", root=root).returncode:
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
    command = [
        sys.executable,
        str(Path(__file__)),
        "--record",
        str(output),
        "--tree",
        str(tree),
        "--only",
        pattern,
    ]
    return subprocess.Popen(command, env=env, cwd=output.parent)


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
    for line in (*new, *differing):
        print(line)
    refused = sum(entry["status"] == 2 for entry in base.values())
    print(f"{len(base)} cases, {refused} of them refused; {len(differing)} differences from {given.base}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
