"""What `make torture` tries, part by part, and how each stands in its table."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mwpb_kernels
import torture_files as files
import torture_kills as kills
from measure import ROOT
from mwpb_kernels.op import OPS
from torture_child import run
from torture_kills import Count

AUTOATTACK = ["evaluate", "--attacks=aa", "--subset=6", "--eps=32/255", "--batch-size=6"]
ALL = ("-m", "slow or not slow")


@dataclass(frozen=True)
class Part:
    """name: of the part; what stands before a colon may be asked for alone. promise, tried: its row of the table,
    which parts with the same of both share. work: from an empty folder to what it counted."""

    name: str
    promise: str
    tried: str
    work: Callable[[Path], Count]

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


def pytest(*words: str, threads: int = 1) -> Callable[[Path], Count]:
    """A part of the test suite, on two processes of one thread or on one of two: each test is a case."""

    def work(folder: Path) -> Count:
        named = [word for word in words if word.startswith("tests/")]
        found = [path for word in named for path in ([word] if "::" in word else map(str, ROOT.glob(word)))]
        if not found:
            raise FileNotFoundError(f"no {' '.join(named)}")
        options = [word for word in words if word not in named]
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--dist", "load"]
        command += [f"-n{2 // threads}", *found, *options]
        command += [f"--junitxml={report}", f"--basetemp={folder / 'tests'}"]
        environment = os.environ | {"OMP_NUM_THREADS": f"{threads}"}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
        if not report.exists():
            raise RuntimeError(f"pytest: {(ended.stdout + ended.stderr).strip()[-300:]}")
        count = Count()
        skipped: list[str] = []
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = [child for child in case if child.tag in ("failure", "error")]
            skipped += [child.get("message") or "" for child in case if child.tag == "skipped"]
            properties = {p.get("name"): p.get("value") for p in case.iter("property")}
            count.cases += int(properties.get("cases") or 1)
            count.failures += [f"{case.get('name')}: {(child.get('message') or '')[:200]}" for child in wrong]
        count.cases -= len(skipped)
        count.notes = f"{len(skipped)} skipped, the first as {skipped[0][:100]}" if skipped else ""
        if ended.returncode not in (0, 1):
            count.failures.append(f"pytest ended with {ended.returncode}")
        return count

    return work


def with_run(work: Callable[[Path, Path], Count]) -> Callable[[Path], Count]:
    """`work` with a trained run to work on."""

    def working(folder: Path) -> Count:
        trained = folder / "trained"
        run([*kills.TRAIN, "--epochs=3", f"--out={trained}"], folder / "training")
        return work(trained, folder)

    return working


def op_names() -> list[str]:
    for module in pkgutil.iter_modules(mwpb_kernels.__path__):  # also ops that the package does not export
        if not module.name.startswith("lib"):
            importlib.import_module(f"mwpb_kernels.{module.name}")
    return sorted(OPS)


def batched(names: list[str], count: int) -> list[list[str]]:
    return [names[i : i + count] for i in range(0, len(names), count)]


def parts() -> list[Part]:
    """All of them, the quick ones first."""
    again = "the same command comes to the bytes of a run that nobody disturbed"
    dies = "a process may die at any moment"
    leaves = "a signal is heeded: status, 20 seconds, and going on"
    damage = "damage is noticed"
    hostile = "hostile input does nothing but end in one line"
    share = "two processes on one folder do no harm"
    ranks = "several processes are as one"
    fails = "a disk may fail: one line, status 1, the state before whole"

    def kill(phase: str, count: int, seed: int) -> Callable[[Path], Count]:
        return lambda folder: kills.killed(kills.training(), phase, count, folder, seed)

    def on_evaluation(
        blow: Callable[..., Count], *more: Any, words: Any = kills.EVALUATE, phase: str = "evaluation", **of: int
    ) -> Any:
        def work(run: Path, folder: Path) -> Count:
            return blow(kills.evaluation(run, words), phase, *more, folder=folder, **of)

        return with_run(work)

    def on_preparation(blow: Callable[..., Count], *more: Any, **seed: int) -> Callable[[Path], Count]:
        def work(folder: Path) -> Count:
            images = kills.write_images(folder / "images")
            return blow(kills.preparation(images), *more, folder=folder, **seed)

        return work

    def evaluations_together(run: Path, folder: Path) -> Count:
        return kills.together(kills.evaluation(run), "another process", 5, folder)

    found = [
        *(Part(f"kills:{phase}:{seed}", dies, f"kill -9 {when}; {again}", kill(phase, 5, seed))
          for phase, when, times in (("training", "in training", 5), ("validation", "in validation", 4),
                                     ("writing", "while a checkpoint is written", 5))
          for seed in range(times)),
        *(Part(f"kills:evaluation:{seed}", dies, f"kill -9 in evaluation; {again}",
               on_evaluation(kills.killed, 5, seed=seed)) for seed in range(3)),
        *(Part(f"kills:preparation:{seed}", dies, "kill -9 while a data set is prepared: none, or a whole one",
               on_preparation(kills.killed, "preparation", 5, seed=seed)) for seed in range(3)),
        Part("signals:training", leaves, "SIGTERM, SIGINT, SIGHUP, SIGUSR1 in training",
             lambda folder: kills.signalled(kills.training(), "training", folder)),
        Part("signals:validation", leaves, "the same in validation",
             lambda folder: kills.signalled(kills.training(), "validation", folder)),
        Part("signals:writing", leaves, "the same while a checkpoint is written",
             lambda folder: kills.signalled(kills.training(), "writing", folder)),
        Part("signals:evaluation", leaves, "the same in PGD", on_evaluation(kills.signalled)),
        Part("signals:autoattack", leaves, "the same in AutoAttack",
             on_evaluation(kills.signalled, words=AUTOATTACK, phase="autoattack", calls=400)),
        Part("signals:preparation", leaves, "the same while a data set is prepared",
             on_preparation(kills.signalled, "preparation")),
        Part("together:training", share, "the second at a random moment: training",
             lambda folder: kills.together(kills.training(), "another process", 10, folder)),
        Part("together:evaluation", share, "evaluation",
             with_run(evaluations_together)),
        Part("together:preparation", share, "preparation",
             on_preparation(lambda task, *more, folder: kills.together(task, "another process", 5, folder))),
        Part("together:shards", share, "parts of evaluations and tables, and a claimant that dies",
             pytest("tests/test_evaluate_claims.py", "tests/test_reproduce_shared.py", "-m", "not slow")),
        Part("damage:checkpoint", damage,
             "each region of a checkpoint and its checksum: named, the one before used",
             lambda folder: files.checkpoints(97, folder)),
        Part("damage:shard", damage, "each region of an evaluation's shards: done again",
             lambda folder: files.shards(50, folder)),
        Part("damage:prepared", damage, "each region of a prepared set: refused by name",
             lambda folder: files.prepared(60, folder)),
        Part("disk:injected", fails, "full, not permitted, read-only, gone, over quota or broken from a write on",
             lambda folder: files.failing_disk(24, folder)),
        Part("disk:real", fails, "a file system that is full or becomes read-only", files.real_disk),
        Part("disk:states", fails, "states that are written beside the training, kept, named, swept",
             pytest("tests/test_writer.py", "tests/test_keep.py", "tests/test_run_states.py", "-m", "not slow")),
        Part("guards", "what goes wrong in training is named", "divergence, collapse, NaN, hangs",
             pytest("tests/test_guards.py", "tests/test_run_faults.py", "tests/test_train_ends.py", *ALL)),
        Part("frozen", "files of every release are read", "a run of 0.1.0 goes on, is evaluated and drawn",
             pytest("tests/test_frozen.py")),
        Part("hostile:archives", hostile, "archives: paths that climb, links, devices, bombs, truncated, corrupt",
             pytest("tests/test_data_archive.py")),
        Part("hostile:pickles", hostile, "pickles and weight files: code, other types, damage",
             pytest("tests/test_model_files.py", "tests/test_checkpoint.py", "tests/test_field_files.py",
                    "-m", "not slow")),
        Part("hostile:data", hostile, "images, .mat files, descriptions of data sets",
             pytest("tests/test_data_images.py", "tests/test_data_sets.py", "tests/test_data_prepared.py",
                    "tests/test_data_cifar.py", "-m", "not slow")),
        Part("hostile:damage", hostile, "images, .mat files and archives damaged at random",
             pytest("tests/test_hostile.py", *ALL, "-k", "damaged")),
        Part("hostile:configurations", hostile, "configurations: YAML and words of the command line",
             pytest("tests/test_config.py", "tests/test_values.py", "tests/test_cli.py")),
        Part("hostile:noise", hostile, "random bytes; images with NaN or outside [0, 1]",
             pytest("tests/test_hostile.py", "-k", "random_bytes or nan")),
        Part("hostile:options", hostile, "every option with absurd values",
             pytest("tests/test_hostile.py", *ALL, "-k", "absurd")),
        Part("ranks:equal", ranks, "1, 2 and 4 processes: AT, TRADES, MART, AWP, adaptive",
             pytest("tests/test_ranks_runs.py", *ALL, "-k", "one_two_and_four")),
        Part("ranks:killed", ranks, "a process killed in an epoch; torchrun starts anew",
             pytest("tests/test_ranks_runs.py", *ALL, "-k", "killed or anew")),
        Part("ranks:other", ranks, "N stopped, M go on, for 1, 2 and 4; as many to the bit",
             pytest("tests/test_ranks_runs.py", *ALL, "-k", "another_number or as_many")),
        Part("ranks:together", ranks, "batches, signals, guards, statistics, evaluation",
             pytest("tests/test_ranks_runs.py", "tests/test_ranks.py", *ALL, "-k",
                    "not (one_two_and_four or killed or anew or another_number or as_many)")),
        Part("sanitizers", "native code stays in its tensors", "the op tests under AddressSanitizer and UBSan",
             pytest("tests/ops/test_native_levels.py", "-m", "slow", "-k", "sanitizers")),
        Part("ops", "ops equal their reference on anything", "arguments of a wrong kind, size, type or device",
             pytest("tests/ops/test_*.py", "-m", "not slow", "--deselect=tests/ops/test_fuzz.py",
                    "--deselect=tests/ops/test_large.py")),
        *(Part(f"fuzz:{names[0]}", "ops equal their reference on anything",
               "10,000 cases an op: sizes, layouts, NaN, labels",
               pytest(*(f"tests/ops/test_fuzz.py::test_fuzz_ten_thousand_cases[{name}]" for name in names),
                      "-m", "slow"))
          for names in batched(op_names(), 4)),
        Part("large", "ops equal their reference on anything", "strides and counts beyond 2^31 elements",
             pytest("tests/ops/test_large.py", *ALL, threads=2)),
    ]  # fmt: skip
    return found
