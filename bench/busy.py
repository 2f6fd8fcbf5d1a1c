"""How fast `mwpb-fast train` is while other programs keep the processor busy, by how OpenMP's threads wait.

    python bench/busy.py --rounds 3 --json bench/results/busy-cpu.json

Each contestant trains the embedded digits in a process of its own, beside no other program, one and four that
never rest; all in turn, round after round. `mwpb-fast` is what a user gets who sets nothing: threads spin or sleep
by what the kernel counts. The others have an OpenMP variable set, and one thread takes its sums in another order.
Images a second are those of the later epochs, the first one warms up.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import spread
from record import Results, leave_at_sigterm

from mwpb_fast.runs.log import read_records

CONTESTANTS = {
    "mwpb-fast": {},
    "OpenMP's default spin": {"GOMP_SPINCOUNT": "300000"},
    "passive waiting": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
COLUMNS = (
    ("load", "other programs", "d"),
    ("name", "threads", ""),
    ("median", "images/s", ",.0f"),
    ("min", "least", ",.0f"),
    ("max", "most", ",.0f"),
    ("share", "share of the fastest", ".0%"),
)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that never rest."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def images_per_second(settings: dict[str, str], epochs: int) -> float:
    """The median of a short training's epochs but the first, under OpenMP's variables `settings`."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    with tempfile.TemporaryDirectory() as folder:
        words = ["digits.at", "--epochs", str(epochs), "--no-evaluate", "--quiet", "--out", f"{folder}/run"]
        command = [sys.executable, "-m", "mwpb_fast", "train", *words]
        subprocess.run(command, env=own | settings, check=True, capture_output=True)
        records = read_records(Path(folder) / "run" / "metrics.jsonl")
    return statistics.median(r["images_per_second"] for r in records[1:])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1, 4], help="how many busy programs beside it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the result")
    o = parser.parse_args(arguments)
    if o.epochs < 2 or o.rounds < 1:
        parser.error("at least 2 epochs, of which the first warms up, and 1 round")
    results = Results(o.json, torch.device("cpu"), COLUMNS, [f"beside {load}" for load in o.loads])
    for load in o.loads:
        speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        with busy(load):
            for _ in range(o.rounds):
                for name, settings in CONTESTANTS.items():
                    speeds[name].append(images_per_second(settings, o.epochs))
        rows = [{"load": load, "name": name, **spread(values)} for name, values in speeds.items()]
        best = max(row["median"] for row in rows)
        rows = [{**row, "share": row["median"] / best} for row in rows]
        results.put(f"beside {load}", rows)
        for row in rows:
            print(", ".join(f"{title} {format(row[key], form)}" for key, title, form in COLUMNS), flush=True)


if __name__ == "__main__":
    leave_at_sigterm()
    main()
