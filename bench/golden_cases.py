"""What bench/golden.py records of the packages that are imported: the cases, and how each is made exact."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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


def switches() -> dict[str, list[str]]:
    """By attack, the options that turn on what is off by default, such as notes that an objective needs."""
    from mwpb_fast import config

    makes = {name: config.load("attacks", name).Config for name, _ in axes()["attack"]}
    return {
        name: [f"--attack.{f.name}=true" for f in dataclasses.fields(make) if getattr(make(), f.name) is False]
        for name, make in makes.items()
    }


def cases() -> Iterator[tuple[str, Callable[[Path], dict[str, Any]]]]:
    """Every case: its name, and what it records given an empty folder."""
    from mwpb_fast import config

    found, more = axes(), switches()
    for values in itertools.product(*found.values()):
        chosen = dict(zip(found, values, strict=True))
        options = [f"--{axis}={name}" for axis, (name, _) in chosen.items()]
        options += [option for _, short in chosen.values() for option in short]
        for engine in ENGINES:
            name = "train/" + "/".join(n for n, _ in chosen.values()) + f"/{engine}"
            words = ("digits.mwpb_at", *STEPS, *options, f"--precision.engine={engine}")
            yield name, partial(first_trained, words=words, extra=more[chosen["attack"][0]])
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


def first_trained(folder: Path, words: Sequence[str], extra: Sequence[str]) -> dict[str, Any]:
    """`trained`; where that is refused, with the first of the extra options that is not."""
    out = trained(folder, words)
    for option in extra:
        if out["status"] != 2:
            break
        out = trained(folder, [*words, option]) | {"with": option}
    return out


def resolved(folder: Path, recipe: str) -> dict[str, Any]:
    """The configuration that a recipe comes to, an entry a value, but for what the embedded data set takes."""
    import yaml

    small = ("--data.subset=32", "--data.last_batch=keep", "--epochs=0")
    out = call("train", recipe, *TINY, *small, f"--out={folder}")
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
