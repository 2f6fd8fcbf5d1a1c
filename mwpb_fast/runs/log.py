"""What a run tells: a JSONL file as the truth, its mirrors, a line an epoch, and progress while it works."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from mwpb_fast.runs.live import live_bar
from mwpb_fast.runs.tracker import Tracker
from mwpb_fast.system import ranks, threads
from mwpb_fast.system.files import to_json, write_atomically
from mwpb_fast.system.lazy import ops, torch
from mwpb_fast.system.optional import attempt, version_of
from mwpb_fast.system.streams import to_terminal
from mwpb_fast.system.units import duration, pace

Item = TypeVar("Item")
NOTICED = 0.1  # seconds that a checkpoint holds the training up, from which on they are told


class RunLog:
    """metrics.jsonl of a run folder, one object an epoch, mirrored to TensorBoard where it is installed.

    epoch: that the run goes on with. Records of it and of later ones, which will be written again, are dropped;
    lines that are no records are named on stderr and kept aside in metrics-damaged.jsonl. tracker: gets the
    records too.
    """

    def __init__(self, folder: Path, epoch: int, tracker: Tracker | None = None) -> None:
        self.path, self._tracker = folder / "metrics.jsonl", tracker
        self._board: Any = None
        self._open_board: Callable[..., Any] | None = None
        self._forget_from(epoch)
        found = attempt("tensorboard", "torch.utils.tensorboard.writer")
        if found.broken:
            note(f"TensorBoard {found.why}: metrics go to metrics.jsonl only")
        if found.module is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._open_board = partial(SummaryWriter, str(folder / "tensorboard"))

    def _forget_from(self, epoch: int) -> None:
        records, bad = parse_records(self.path)
        if bad:
            aside = self.path.with_name("metrics-damaged.jsonl")
            with aside.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in bad.values()))
            lines = ", ".join(map(str, bad))
            note(f"{self.path}: no record in line {lines}; kept in {aside.name}, and the run goes on")
        kept = [record for record in records if record["epoch"] < epoch]
        write_atomically(self.path, "".join(to_json(record) + "\n" for record in kept).encode())

    def go_back(self, epoch: int) -> None:
        """Drop the records of `epoch` and of later ones, which will be written again."""
        if self._board is not None:
            self._board.close()
        self._board = None
        self._forget_from(epoch)

    def write(self, record: dict[str, Any]) -> None:
        """Append one epoch's record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._open_board is not None:
            try:
                self._draw(self._open_board, record)
            except Exception as error:  # The records are safe, whatever their picture dies of.
                note(f"no more points for TensorBoard: {' '.join(str(error).split())}")
                self._board = self._open_board = None
        if self._tracker is not None:
            self._tell(self._tracker.log, record)

    def _tell(self, call: Callable[..., None], *words: Any) -> None:
        assert self._tracker is not None
        try:
            call(*words)
        except Exception as error:
            note(f"no more records for {self._tracker.package}: {' '.join(str(error).split())}")
            self._tracker = None

    def _draw(self, open_board: Callable[..., Any], record: dict[str, Any]) -> None:
        if self._board is None:
            # What an earlier part of the run drew from this epoch on is hidden, since this one draws it again.
            self._board = open_board(purge_step=record["epoch"])
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self._board.add_scalar(name, value, record["epoch"])
        self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            self._tell(self._tracker.finish)


def note(text: str) -> None:
    """A line on stderr."""
    print(f"mwpb-fast: {ranks.label()}{text}", file=sys.stderr, flush=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; lines that are none are passed over."""
    return parse_records(path)[0]


def parse_records(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The records of a metrics file, and the lines that are none by their numbers, counted from 1; but a last line
    that a crash cut short is neither."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], {}
    records, bad = [], {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
            if not isinstance(record, dict) or type(record["epoch"]) is not int:
                raise ValueError("not a record")
            records.append(record)
        except (ValueError, KeyError, RecursionError):
            if line.strip() and number < len(lines):
                bad[number] = line
    return records, bad


class Waits(Generic[Item]):
    """An iterator that counts in `seconds` how long its reader waited for items, without asking the device."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.seconds = 0.0
        self._items = iter(items)

    def __iter__(self) -> Waits[Item]:
        return self

    def __next__(self) -> Item:
        started = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - started


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the record."""
    on_cuda = device.type == "cuda"
    return {
        "mwpb-fast": own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "openmp": threads.chosen(),
        "ops": {op: ops.implementation(op, device) for op in sorted(ops.OPS)},
    }


def write_environment(folder: Path, device: torch.device) -> None:
    """The record of versions and machine, environment.json of a run's folder."""
    write_atomically(folder / "environment.json", to_json(environment(device), indent=1).encode())


def own_version() -> str:
    """The version that is installed; a checkout also runs without, and then says its own."""
    if installed := version_of("mwpb-fast"):
        return installed
    try:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
            "project"
        ]
        return f"{project['version']}, not installed" if project["name"] == "mwpb-fast" else "not installed"
    except (OSError, ValueError, KeyError):
        return "not installed"


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def radius_text(low: float, mean: float, high: float) -> str:
    """The radii of some images as users write radii: such as `radius 6.0 (4.0 to 9.0)/255`."""
    return f"radius {255 * mean:.1f}" + ("" if low == high else f" ({255 * low:.1f} to {255 * high:.1f})") + "/255"


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch's record in one line."""
    accuracy = f"natural {record['natural']:5.2f} % robust {record['robust']:5.2f} %" if "robust" in record else ""
    radii = radius_text(*(record[f"radius_{name}"] for name in ("min", "mean", "max")))
    stall = f" checkpoint {record['checkpoint']:.1f} s" if record["checkpoint"] >= NOTICED else ""
    return (
        f"epoch {record['epoch']:3d}/{epochs} {record['phase']:6s} loss {record['loss']:.4f} {accuracy} {radii} "
        f"lr {record['learning_rate']:.2g} {pace(record['images_per_second'], 'images')}{stall}"
    )


def progress(
    total: int,
    label: str,
    unit: str = "images",
    every: float = 10.0,
    done: int = 0,
    form: str = "lines",
    sure: float = 0.0,
) -> Progress:
    """Progress over `total` units, `done` of them before. form: lines, a bar with rate and time left on a terminal
    and a plain line every `every` seconds otherwise; json, an object as often on standard output; or quiet, as for
    all of several processes but rank 0. sure: the share of what there was to do that must be done before a time
    left is told."""
    return Progress(total, label, unit, every, done, form if ranks.leads() else "quiet", sure)


class Progress:
    """Context manager; call advance(n, note) as work is done."""

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        every: float = 10.0,
        done: int = 0,
        form: str = "lines",
        sure: float = 0.0,
    ) -> None:
        self.total, self.label, self.unit, self.every, self.form = total, label, unit, every, form
        self.sure = sure
        self.before = self.done = done
        self.live: Any = None

    def __enter__(self) -> Progress:
        self.started = self.shown = time.monotonic()
        if self.form == "lines" and to_terminal():
            self.live = live_bar(self.label, self.total, self.done)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live is not None:
            self.live.stop()

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.before) / max(time.monotonic() - self.started, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds to the end at the rate so far; None as long as that says nothing."""
        new, whole = self.done - self.before, self.total - self.before
        return max(whole - new, 0) / self.rate if new > 0 and new >= self.sure * whole else None

    def advance(self, n: int, note: str = "", status: str = "") -> None:
        """`n` more units are done; `note` is shown beside the rate, `status` below, where there is a bar."""
        self.done += n
        text, left = pace(self.rate, self.unit), self.left
        told = "" if left is None else f"{duration(left)} left"
        if self.live is not None:
            self.live.show(n, text if status else f"{text} {note}", status, told)
        elif self.form != "quiet" and time.monotonic() - self.shown > self.every:
            self.shown = time.monotonic()
            if self.form == "json":
                about = {"what": self.label, "done": self.done, "of": self.total, "unit": self.unit}
                about |= {"rate": self.rate, "seconds_left": left, "note": note}
                print(to_json({"event": "progress", **about}), flush=True)
                return
            line = [f"{self.label}: {self.done}/{self.total}", f"{text} {note}".strip(), told]
            print(", ".join(filter(None, line)), file=sys.stderr, flush=True)
