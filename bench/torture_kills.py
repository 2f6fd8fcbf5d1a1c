"""Torture by the system: kill -9 at random moments of each phase, signals in each phase, two processes at once.

Each test gives a Count of what was tried and what failed. What a killed command was at is done again by the same
command, and must come out as where nobody disturbed it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torture_child import Command, run

from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import read_records
from mwpb_fast.system.signals import STOPS

# Small enough for an epoch in a tenth of a second, with all that a checkpoint may hold.
TRAIN = ["train", "digits.mwpb_trades", "--data.subset=64", "--data.validation=0.02", "--data.batch_size=16",
         "--model.name=smallresnet-2", "--attack.steps=1", "--optim.ema=0.9", "--warmup_epochs=2",
         "--no-evaluate"]  # fmt: skip
EPOCHS = 8
EVALUATE = ["evaluate", "--attacks=natural,pgd5,cw5,pgd5x2", "--eps=16/255", "--batch-size=50"]
# seconds after the beginning of a phase within which the blow falls: about what one of its calls takes
SPAN = {
    "training": 0.15,
    "validation": 0.1,
    "writing": 0.02,
    "evaluation": 0.5,
    "autoattack": 0.1,
    "preparation": 0.05,
}
MOST_SECONDS = 20.0  # from a signal to the end of the command


@dataclass
class Count:
    """cases: what was tried. failures: what went wrong, in words. notes: what else the table says."""

    cases: int = 0
    failures: list[str] = field(default_factory=list)
    notes: str = ""

    def expect(self, right: bool, what: str) -> None:
        if not right:
            self.failures.append(what)


@dataclass
class Task:
    """A command, what it has in its folder at the end, and what must hold after a kill."""

    words: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    after_kill: Callable[[Path, Count], None]
    begin: Callable[[Path], object] = lambda folder: folder.mkdir(parents=True, exist_ok=True)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


# training --------------------------------------------------------------------------------------------------------
def training() -> Task:
    def result(folder: Path) -> Any:
        (_, last), (_, best) = (newest(folder, kind) for kind in ("last", "best"))
        timeless = [{k: v for k, v in r.items() if k in ("epoch", "loss", "natural", "robust")}
                    for r in read_records(folder / "metrics.jsonl")]  # fmt: skip
        return {"last": last, "best": best, "records": timeless}

    def after_kill(folder: Path, count: Count) -> None:
        done = len(read_records(folder / "metrics.jsonl"))
        files = checkpoint.existing(folder / "checkpoints", "last")
        if done < 2 and not files:
            return
        try:
            found = checkpoint.read_newest(folder / "checkpoints", "last")
        except checkpoint.CheckpointError as error:
            count.failures.append(f"after {done} epochs: {error}")
            return
        # of the last epoch on record the checkpoint may not have been whole: one interval
        count.expect(found is not None and found[1]["epoch"] >= done, f"more than one of {done} epochs lost")

    return Task(
        lambda folder: [*TRAIN, f"--epochs={EPOCHS}", f"--out={folder / 'run'}"],
        lambda folder: result(folder / "run"),
        lambda folder, count: after_kill(folder / "run", count),
    )


def newest(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    found = checkpoint.read_newest(folder / "checkpoints", kind)
    assert found is not None, f"{folder}: no {kind}"
    return found[0], {k: v for k, v in found[1].items() if k not in ("seconds", "waited")}


# evaluation ------------------------------------------------------------------------------------------------------
def evaluation(trained: Path, words: Sequence[str] = EVALUATE) -> Task:
    """Of a run, which is copied."""

    def result(folder: Path) -> Any:
        content = json.loads((folder / "run" / "evaluation-best.json").read_bytes())
        return {name: attack["flags"] for name, attack in content["attacks"].items()} | {"worst": content["worst"]}

    def after_kill(folder: Path, count: Count) -> None:
        for path in folder.glob("run/evaluation-best/*.json"):
            try:
                json.loads(path.read_bytes())
            except ValueError:
                count.failures.append(f"{path.name} is half a file")

    command, *options = words
    return Task(lambda folder: [command, str(folder / "run"), *options], result, after_kill,
                lambda folder: shutil.copytree(trained, folder / "run"))  # fmt: skip


# preparation -----------------------------------------------------------------------------------------------------
def preparation(source: Path) -> Task:
    from mwpb_fast.data import Config, DataError, load_split

    def result(folder: Path) -> Any:
        made = (load_split(Config(name="folder:t", dir=str(folder)), split) for split in ("train", "test"))
        return [(images.sha256, images.labels.tolist()) for images in made]

    def after_kill(folder: Path, count: Count) -> None:
        try:
            result(folder)
        except DataError as error:
            count.expect("missing" in str(error), f"a set that is not whole: {error}")

    return Task(lambda folder: ["data", "prepare", "folder:t", "--from", str(source), "--dir", str(folder),
                                "--replace"], result, after_kill)  # fmt: skip


def write_images(folder: Path, count: int = 300) -> Path:
    """A folder of images per class, of random pixels."""
    from PIL import Image

    dice = random.Random(0)
    for number in range(count):
        place = folder / ("test" if number % 5 == 0 else "train") / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (32, 32), dice.randbytes(3 * 32 * 32)).save(place / f"{number}.png")
    return folder


# the blows -------------------------------------------------------------------------------------------------------
def undisturbed(task: Task, folder: Path) -> Any:
    task.begin(folder)
    run(task.words(folder), folder)
    return task.result(folder)


def killed(task: Task, phase: str, kills: int, folder: Path, seed: int = 0) -> Count:
    """kill -9 at so many random moments of a phase, the same command going on after each; what comes out in the
    end is what comes out undisturbed."""
    dice, count, expected = random.Random(seed), Count(), undisturbed(task, folder / "whole")
    for number in folders(folder):
        if count.cases == kills:
            break
        task.begin(number)
        while count.cases < kills:
            command = Command(task.words(number), number)
            if not command.wait_for(phase, dice.randrange(1, 4)):
                break  # it is done
            time.sleep(SPAN[phase] * dice.random())
            command.kill()
            count.cases += 1
            task.after_kill(number, count)
        run(task.words(number), number)
        count.expect(same(task.result(number), expected), f"another result after {count.cases} kills")
        shutil.rmtree(number)
    return count


def folders(place: Path) -> Iterator[Path]:
    number = 0
    while True:
        yield place / str(number)
        number += 1


def signalled(task: Task, phase: str, folder: Path, seed: int = 0, calls: int = 2) -> Count:
    """Each signal that asks to stop, in one of the first `calls` of a phase: the command leaves in time with its
    status, and goes on."""
    dice, count, expected, slowest = random.Random(seed), Count(), undisturbed(task, folder / "whole"), 0.0
    for number in STOPS:
        place = folder / number.name
        command = sent_to(task, phase, place, number, dice, calls)
        if command is None:
            count.failures.append(f"{number.name}: no {phase} to send it in")
            continue
        sent = time.monotonic()
        status = command.status()
        slowest = max(slowest, time.monotonic() - sent)
        count.cases += 1
        said = command.errors.strip()[-200:]
        count.expect(status in (128 + number, 0), f"{number.name} in {phase}: status {status}: {said}")
        count.expect(time.monotonic() - sent < MOST_SECONDS, f"{number.name} in {phase}: slower than 20 s")
        run(task.words(place), place)
        count.expect(same(task.result(place), expected), f"{number.name} in {phase}: another result")
    count.notes = f"slowest {slowest:.1f} s"
    return count


def sent_to(
    task: Task, phase: str, place: Path, number: signal.Signals, dice: random.Random, calls: int
) -> Command | None:
    """The command, to which the signal was sent in one of the first `calls` of a phase; None where it has ended
    before that ten times."""
    for _ in range(10):
        task.begin(place)
        command = Command(task.words(place), place)
        if command.wait_for(phase, dice.randint(1, calls)):
            time.sleep(SPAN[phase] * dice.random() / 2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(command.process.pid or 0, number)
                return command
        command.status()
        shutil.rmtree(place)
    return None


def together(task: Task, refusal: str, rounds: int, folder: Path) -> Count:
    """Two processes with one command on one folder, the second at random moments: it is refused, or waits, or both
    come to the right result; never a wrong one."""
    dice, count, expected = random.Random(0), Count(), undisturbed(task, folder / "whole")
    for number in range(rounds):
        place = folder / str(number)
        task.begin(place)
        (place / "second").mkdir()
        first = Command(task.words(place), place)
        time.sleep(0.3 * dice.random())
        second = Command(task.words(place), place / "second")
        for command in (first, second):
            status = command.status()
            fine = status == 0 or (status == 2 and refusal in command.errors)
            count.expect(fine, f"status {status}: {command.errors.strip()[-200:]}")
        count.cases += 1
        run(task.words(place), place)
        count.expect(same(task.result(place), expected), "another result")
    return count
