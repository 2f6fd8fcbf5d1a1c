"""The stages of the suite for a CUDA machine: their commands, whole and at toy size, and their shares of time."""

from __future__ import annotations

import argparse
import os
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import ROOT, write_results

WORKERS = 10  # of pytest on a GPU that they share
FIRST_TESTED = ("capture", "step", "tune", "twin", "precision")


@dataclass(frozen=True)
class Stage:
    """name: of the stage and its JSON. weight: its part of the time, in seconds by default. needs: packages
    without which it is skipped. words: from the options, its seconds and its JSON to its command. finish: makes
    the JSON where the command does not, told whether it was cut off."""

    name: str
    weight: float
    words: Callable[[argparse.Namespace, float, Path], list[str]]
    needs: tuple[str, ...] = ()
    finish: Callable[[list[str], Path, argparse.Namespace, bool], None] | None = None


def shown(path: Path) -> str:
    """A path from the checkout's root, where every stage runs; so it stands in the result files."""
    return os.path.relpath(path, ROOT)


def script(name: str, full: str, quick: str, seconds: float = 0.7) -> Callable[..., list[str]]:
    """The command of a script in this folder. {budget} in its words is `seconds` of the stage's own."""

    def words(o: argparse.Namespace, limit: float, out: Path) -> list[str]:
        text = (quick if o.quick else full).format(budget=round(seconds * limit))
        named: list[str] = []
        if o.archive and "{archive}" in text:
            named = ["--archive", shown(o.archive)]
        if o.archive and "{shared}" in text:
            named = ["--shared", shown(o.archive.parent)]
        text = text.replace("{archive}", "").replace("{shared}", "")
        device = [] if name == "kernels" else ["--device", o.device]
        return [f"bench/{name}.py", *text.split(), *named, *device, "--json", shown(out)]

    return words


def pytest_words(o: argparse.Namespace, limit: float, out: Path) -> list[str]:
    which = ["tests/test_bench_tables.py"] if o.quick else ["-m", "gpu", *gpu_tests()]
    if find_spec("xdist") is not None:
        which = ["-n", "2" if o.quick else str(min(WORKERS, os.cpu_count() or 1)), *which]
    options = [
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.interruptible",
        "--continue-on-collection-errors",
        "--tb=long",
        "-q",
    ]
    return ["-m", "pytest", *options, *which, f"--junitxml={shown(out.with_suffix('.xml'))}"]


def gpu_tests() -> list[str]:
    """The files with tests for a CUDA device, the most telling first; collecting the others would take longer than
    running these."""

    def rank(path: Path) -> tuple[int, str]:
        place = next((i for i, word in enumerate(FIRST_TESTED) if word in path.stem), len(FIRST_TESTED))
        return place, path.as_posix()

    files = (ROOT / "tests").rglob("test_*.py")
    return [shown(p) for p in sorted(files, key=rank) if "mark.gpu" in p.read_text(encoding="utf-8")]


def pytest_result(command: list[str], out: Path, o: argparse.Namespace, cut: bool) -> None:
    """The tests' counts and the names of those that failed, from pytest's own report; cut: it lacks some."""
    report = out.with_suffix(".xml")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    if cut:  # the others were running, as many as there are processes
        cases = [c for c in cases if c.find("properties/property[@name='finished']") is not None]
    kinds = {kind: [c for c in cases if c.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    bad = [f"{c.get('classname')}::{c.get('name')}" for kind in ("failure", "error") for c in kinds[kind]]
    tests, skipped = len(cases), len(kinds["skipped"])
    passed = tests - skipped - len(bad)
    row = {"tests": tests, "skipped": skipped, "failed": len(bad), "names": bad, "passed": passed}
    columns = [(k, k, "d") for k in ("tests", "passed", "skipped", "failed")]
    more = {"unfinished": ["the other tests"]} if cut else {}
    write_results(out, torch.device(o.device), columns, [row], suite_command=shlex.join(command), **more)


TINY = "--model smallresnet-2 --batch 4 --rounds 1"
STEP = "--batch 128 --tune --budget {budget}"
# in the variants' names; an illegal access of theirs would take the others' figures along
OF_TRITON = "one_kernel stem"
# whether it works and where the time goes; then what it is compared with, and more of the same
STAGES = (
    Stage("tests", 60, pytest_words, needs=("pytest",), finish=pytest_result),
    Stage(
        "train",
        120,
        script(
            "train",
            f"--recipes table1.mwpb_at {STEP} --steps 10 --rounds 5 --no-compile --profile --without {OF_TRITON}",
            f"--recipes table1.mwpb_at {TINY} --size 8 --no-compile --profile --without {OF_TRITON}",
        ),
    ),
    Stage(
        "training",
        40,
        script(
            "short_training",
            "{{archive}} --epochs 3 --test-images 2000",
            "--epochs 2 --subset 64 --test-images 20 --model smallresnet-2",
        ),
    ),
    Stage(
        "equivalence",
        35,
        script(
            "equivalence",
            "{{archive}} --objectives at --eps 8 1 --train-steps 60",
            "--train-model smallresnet-2 --train-steps 2 --train-batch 4 --attack-steps 1 --per-class 1 "
            "--eps 8 --objectives at --seeds 2 --no-weights",
        ),
    ),
    Stage(
        "kernels",
        30,
        script(
            "kernels",
            "--rounds 15 --budget 0.5 --compile-seconds {budget}",
            "margin linf_step_ --rounds 3 --budget 0.1 --no-compile",
            seconds=0.3,
        ),
    ),
    Stage("layouts", 10, script("layouts", "", f"{TINY} --size 8")),
    Stage(
        "attack",
        60,
        script(
            "attack",
            "--compile --tune --rounds 7 --budget {budget} --only mwpb TRADES torchattacks",
            f"{TINY} --size 8 --steps 1 --only mwpb TRADES",
            seconds=0.85,
        ),
    ),
    Stage(
        "autoattack-parts",
        10,
        script(
            "autoattack",
            "--model resnet-18 --batch 250 --length 0.2 --rounds 3 --only mwpb --budget {budget}",
            f"{TINY} --size 8 --length 0.05 --only eager --parts apgd-ce",
        ),
        needs=("pyautoattack",),
    ),
    Stage(
        "train-fused",
        25,
        script(
            "train",
            f"--recipes table1.mwpb_at {STEP} --steps 10 --rounds 5 --no-compile --profile "
            f"--only float32 {OF_TRITON}",
            f"--recipes table1.mwpb_at {TINY} --size 8 --no-compile --only float32 {OF_TRITON}",
        ),
    ),
    Stage(
        "train-wrn",
        35,
        script(
            "train",
            f"--recipes table2.mwpb_at {STEP} --rounds 3 --steps 4 --no-compile",
            f"--recipes table2.mwpb_at {TINY} --size 8 --no-compile",
        ),
    ),
    Stage(
        "train-compiled",
        30,
        script(
            "train",
            f"--recipes table1.mwpb_at {STEP} --steps 10 --rounds 5 --only float32 compiled",
            f"--recipes table1.mwpb_at {TINY} --size 8 --no-compile --only float32",
            seconds=0.8,
        ),
    ),
    Stage(
        "train-others",
        35,
        script(
            "train",
            f"--recipes table1.mwpb_trades table1.mwpb_mart {STEP} --steps 10 --rounds 3 --no-compile",
            f"--recipes table1.mwpb_trades {TINY} --size 8 --no-compile --only float32 twin",
        ),
    ),
    Stage(
        "roofline",
        15,
        script("roofline", "--rounds 5 --budget 0.2", f"{TINY} --size 8 --budget 0.1"),
    ),
    Stage(
        "loaders",
        20,
        script(
            "loaders",
            "{{shared}} --rounds 2 --seconds 0.5 --steps 20 --sets tinyimagenet",
            "--sets --random 64 --model smallresnet-2 --batch 4 --steps 1 --rounds 1 --seconds 0.1",
        ),
    ),
)
SECONDS = sum(stage.weight for stage in STAGES)
