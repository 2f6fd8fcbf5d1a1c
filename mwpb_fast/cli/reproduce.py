"""The command `reproduce`: what it takes, and in which order things are done."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mwpb_fast.cli.parser import Parser
from mwpb_fast.config.option_values import path, whole
from mwpb_fast.reproduce import launch, tables
from mwpb_fast.reproduce.failures import Failures
from mwpb_fast.reproduce.plan import PlannedRun, plan_runs
from mwpb_fast.reproduce.report import plan_lines, publish
from mwpb_fast.system import ranks


def reproduce(arguments: Sequence[str]) -> int:
    """train, attack and render a table of the paper, ours beside theirs"""
    parser = Parser(
        "reproduce",
        f"Run what a table of the paper needs, and render it with ours beside: {', '.join(tables.TABLES)}.\n"
        "The same command goes on after any stop, and does nothing twice. Runs go to DIR/runs, the table as\n"
        "text, CSV, JSON and picture to DIR/TABLE; several processes with one --out share the runs.\n"
        "docs/reproduce.md of the repository tells more.",
        "Any value of the configuration is set for every row by an option of its name, as in train:\n"
        "  mwpb-fast reproduce table1 --rows mwpb_mart --budget.alpha 0.6",
    )
    add = parser.add_argument
    add("table", metavar="TABLE", help="such as table1")
    own = [
        add("--rows", metavar="A,B,...", help="of the table (default: all)"),
        add("--seeds", type=whole, default=3, metavar="N", help="runs of each row (default: 3)"),
        add("--epochs", type=whole, default=0, metavar="N", help="in all; warm-up and drops in proportion"),
        add("--subset", metavar="N", help="train on so many images"),
        add("--model", metavar="M", help="in place of the table's, such as smallresnet-16"),
        add("--test-subset", metavar="N", help="attack so many test images"),
        add("--long-subset", type=whole, default=0, metavar="N", help="the same for long attacks, such as aa"),
        add("--attacks", metavar="A,B,...", help="in place of the table's"),
        add("--last", choices=["all", "cheap"], default="", help="attacks on the last checkpoint"),
        add("--out", type=path, default=Path("runs/reproduce"), metavar="DIR",
            help="runs in DIR/runs, the table in DIR/TABLE (default: runs/reproduce)"),
        add("--data-dir", metavar="DIR", help="holds the prepared data sets"),
        add("--device", metavar="cuda:0", help="auto, cpu, cuda or cuda:N"),
        add("--render-only", action="store_true", help="run nothing, render what there is"),
        add("--quiet", action="store_true", help="no line for each epoch, and no progress"),
        add("--launcher", choices=["submitit"], help="hand the runs to a cluster; submitit's executor takes "
            "--slurm.partition and all its other parameters"),
        add("--cluster", choices=launch.CLUSTERS, default="slurm", help="slurm, or local for this machine"),
        add("--jobs", type=whole, metavar="N", help="of the launcher (default: one for each run; local: 1)"),
        add("--worker", action="store_true", help="leave when others have what is left; try no failed run"),
    ]  # fmt: skip
    given, words = parser.parse_with_overrides(own, arguments)
    overrides = [word for word in words if not word.startswith("--slurm.")]
    cluster = dict(word.removeprefix("--slurm.").partition("=")[::2] for word in words if word not in overrides)
    table = tables.find_table(given.table)
    for name, value in (
        ("data.subset", given.subset),
        ("model.name", given.model),
        ("evaluation.subset", given.test_subset),
        ("evaluation.attacks", given.attacks),
        ("data.dir", given.data_dir),
        ("precision.device", given.device),
    ):
        overrides += [] if value is None else [f"--{name}={value}"]
    if min(given.seeds - 1, given.epochs, given.long_subset) < 0:
        parser.error("--seeds must be at least 1, --epochs and --long-subset not negative")
    if not given.launcher and (cluster or given.cluster != "slurm" or given.jobs is not None):
        parser.error("--cluster, --jobs and --slurm. are for --launcher submitit")
    if given.launcher and (given.worker or given.render_only or given.jobs == 0):
        parser.error("--launcher submitit takes no --worker and no --render-only, and --jobs at least 1")

    runs = plan_runs(
        table,
        given.rows.split(",") if given.rows is not None else [],
        given.seeds,
        given.out,
        overrides,
        epochs=given.epochs,
        last=given.last,
        long_subset=given.long_subset,
    )

    folder, failures = given.out / table.name, dict[str, str]()
    if ranks.first():
        print("\n".join(plan_lines(table, runs, given.out)), flush=True)
    if given.launcher:
        if (broken := _launch(given, cluster, runs, [*launch.words_of(arguments), "--worker"])) is None:
            return 0
        failures = broken | Failures(runs).all()
    elif not given.render_only:
        from mwpb_fast.reproduce.execute import execute

        failures = execute(
            runs,
            quiet=given.quiet,
            worker=given.worker,
            after=lambda found: publish(table, runs, folder, found, pictures=False),
        )
    _, written, reason = publish(table, runs, folder, failures)
    if not ranks.first():
        return 1 if failures else 0
    print((folder / "table.md").read_text(encoding="utf-8"))
    for file in written:
        print(f"written: {file}")
    if reason:
        note(f"no pictures: {reason}")
    for name, failure in failures.items():
        note(f"{name} failed: {failure}")
    return 1 if failures else 0


def _launch(
    given: argparse.Namespace, parameters: dict[str, str], runs: Sequence[PlannedRun], words: Sequence[str]
) -> dict[str, str] | None:
    """Have jobs make what is left of the runs; the jobs that failed, or None where they are not waited for."""
    todo = [run for run in runs if run.state() != "done"]
    folder, name, local = given.out / "jobs", f"mwpb-{given.table}", given.cluster == "local"
    executor = launch.executor(folder, name, given.cluster, parameters)
    if not todo:
        return {}

    from mwpb_fast.reproduce.execute import check

    check(todo)
    Failures(runs, anew=True)
    # submitit shows a job on this machine no device but those that it is asked for
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "all") if local and "gpus_per_node" not in parameters else ""
    worker = launch.Worker(["reproduce", *words], os.getcwd(), devices)
    jobs = launch.submit(executor, worker, given.jobs or (1 if local else len(todo)))
    numbers = ", ".join(job.job_id for job in jobs)
    print(f"{given.cluster}: jobs {numbers}; their output is in {folder}", flush=True)
    if local:
        return launch.wait(jobs)
    print("the last of them renders the table; --render-only in place of --launcher shows how far they are")
    return None


def note(text: str) -> None:
    """A line on stderr."""
    print(f"mwpb-fast: {text}", file=sys.stderr)
