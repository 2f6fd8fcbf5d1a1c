"""Torture of files: every region of those that a run lives on damaged, and disks that fail at every write.

All of it in this process, by the commands themselves. Each test gives a Count (see torture_kills.py).
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from torture_kills import EVALUATE, TRAIN, Count, Task, evaluation, preparation, same, training, write_images

from mwpb_fast import cli
from mwpb_fast.data import Config, DataError, load_split
from mwpb_fast.runs import checkpoint

SHORT = [*TRAIN, "--epochs=3", "--quiet"]
FAULTS = {"full": errno.ENOSPC, "not permitted": errno.EACCES, "read-only": errno.EROFS, "gone": errno.ENOENT,
          "over quota": errno.EDQUOT, "broken": errno.EIO}  # fmt: skip
KINDS = ("bit", "zeros", "cut", "longer", "other bytes")


def call(words: Sequence[str]) -> tuple[int, str]:
    """A command's exit status and what it said on stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(list(words))
    return status, err.getvalue()


def done(words: Sequence[str]) -> None:
    status, err = call(words)
    assert status == 0, f"{words}: status {status}: {err[-300:]}"


def damaged(content: bytes, at: int, kind: str, dice: random.Random) -> bytes:
    """`content` with damage of a kind that begins at `at`; never the same bytes."""
    if kind == "cut":
        return content[:at]
    if kind == "longer":
        return content[:at] + dice.randbytes(1 + dice.randrange(64)) + content[at:]
    if kind == "bit":
        return content[:at] + bytes([content[at] ^ (1 << dice.randrange(8))]) + content[at + 1 :]
    size = min(len(content) - at, 1 + dice.randrange(512))
    found = bytes(size) if kind == "zeros" else dice.randbytes(size)
    made = content[:at] + found + content[at + size :]
    return made if made != content else damaged(content, at, "bit", dice)


def damages(path: Path, tries: int, size: int = 0, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Damage a file in each of as many regions in turn, in kinds that alternate; it is put right afterwards."""
    dice, good = random.Random(seed), path.read_bytes()
    size = size or len(good)
    try:
        for number in range(tries):
            low, high = number * size // tries, max((number + 1) * size // tries, number * size // tries + 1)
            at, kind = dice.randrange(low, min(high, size)), KINDS[number % len(KINDS)]
            path.write_bytes(damaged(good, at, kind, dice))
            yield kind, at
    finally:
        path.write_bytes(good)


# corruption ------------------------------------------------------------------------------------------------------
def checkpoints(tries: int, folder: Path) -> Count:
    """The newest state of a run damaged: it is named, and the one before is used; and so where its checksum is."""
    count, run = Count(), folder / "run"
    done([*SHORT, f"--out={run}"])
    result = training().result(folder)
    newest, before = checkpoint.existing(run / "checkpoints", "last")
    sums = newest.with_suffix(".pt.sha256")
    for path, share, size in ((newest, tries - tries // 4, 0), (sums, tries // 4, 64)):
        for kind, at in damages(path, share, size):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                found = checkpoint.read_newest(run / "checkpoints", "last")
            count.cases += 1
            right = found is not None and found[0] == before and newest.name in said.getvalue()
            count.expect(right, f"{path.name}: {kind} at byte {at} was not noticed")
    for _ in damages(newest, 3, seed=1):  # the whole command goes on from the one before
        status, err = call([*SHORT, f"--out={run}"])
        count.cases += 1
        right = status == 0 and newest.name in err and same(training().result(folder), result)
        count.expect(right, f"a run with a damaged state: status {status}: {err.strip()[-200:]}")
    return count


def shards(tries: int, folder: Path) -> Count:
    """A shard of an evaluation damaged: it is done again, and the result is the same."""
    count, run = Count(), folder / "run"
    done([*SHORT, f"--out={run}"])
    task, words = evaluation(run), ["evaluate", str(run), *EVALUATE[1:]]
    done(words)
    expected = task.result(folder)
    result = run / "evaluation-best.json"
    files = sorted(run.glob("evaluation-best/*.json"))
    for path in files:
        for kind, at in damages(path, -(-tries // len(files))):
            result.unlink()
            status, err = call(words)
            count.cases += 1
            right = status == 0 and same(task.result(folder), expected)
            count.expect(right, f"{path.name}: {kind} at byte {at}: status {status}: {err.strip()[-200:]}")
    return count


def prepared(tries: int, folder: Path) -> Count:
    """A file of a prepared set damaged: it is refused by name."""
    count, place = Count(), folder / "data"
    done(["data", "prepare", "folder", "--from", str(write_images(folder / "images", 40)), "--dir", str(place)])
    files = sorted((place / "folder").iterdir())
    for path in files:
        split = "test" if path.name.startswith("test") else "train"
        for kind, at in damages(path, -(-tries // len(files))):
            count.cases += 1
            try:
                load_split(Config(name="folder", dir=str(place)), split)
            except DataError as error:
                told = str(path) in str(error) and "\n" not in str(error)
                count.expect(told, f"{path.name}: {kind} at byte {at}: {error}")
            else:
                # JSON may be written with other spaces and say the same
                spaces = path.suffix == ".json" and _says_the_same(path)
                count.expect(spaces, f"{path.name}: {kind} at byte {at} was not noticed")
        load_split(Config(name="folder", dir=str(place)), split)
    return count


def _says_the_same(path: Path) -> bool:
    from mwpb_fast.system.files import is_whole

    content = json.loads(path.read_bytes())
    return "sha256" in content and is_whole(content)


# disks that fail -------------------------------------------------------------------------------------------------
class Failing:
    """Inside the block the `at`th write below `folder` fails, and all that come after: opening a file to write,
    waiting for the disk, renaming, making a folder. at None: none does. `writes` counts them."""

    def __init__(self, folder: Path, at: int | None, number: int) -> None:
        self.folder, self.at, self.number, self.writes = folder, at, number, 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Failing:
        def watch(owner: Any, name: str, mine: Callable[..., bool]) -> None:
            real = getattr(owner, name)

            def wrapper(*words: Any, **more: Any) -> Any:
                if mine(*words, **more):
                    self._count(words[0])
                return real(*words, **more)

            self._stack.enter_context(mock.patch.object(owner, name, wrapper))

        def here(path: Any, *words: Any, **more: Any) -> bool:
            return isinstance(path, (str, Path)) and Path(path).is_relative_to(self.folder)

        def to_write(path: Any, mode: str = "r", *words: Any, **more: Any) -> bool:
            return here(path) and not mode.startswith("r")

        watch(Path, "open", to_write)
        watch(Path, "mkdir", here)
        watch(os, "replace", here)
        watch(os, "fsync", lambda descriptor: here(os.readlink(f"/proc/self/fd/{descriptor}")))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _count(self, path: Any) -> None:
        self.writes += 1
        if self.at is not None and self.writes >= self.at:
            name = str(path) if isinstance(path, (str, Path)) else None
            raise OSError(self.number, os.strerror(self.number), name)


def failing_disk(points: int, folder: Path) -> Count:
    """A disk that fails from the nth write on, for so many n over the whole of a run, an evaluation and the
    preparation of a set, by each fault in turn: one line, status 1, the state before it whole; then the same
    command comes to the same result."""
    done([*SHORT, f"--out={folder / 'trained' / 'run'}"])
    short = Task(lambda place: [*SHORT, f"--out={place / 'run'}"], training().result, training().after_kill)
    tasks = {"training": short, "evaluation": evaluation(folder / "trained" / "run"),
             "preparation": preparation(write_images(folder / "images", 20))}  # fmt: skip
    count, notes = Count(), []
    for share, (name, task) in zip(
        (points - 2 * (points // 4), points // 4, points // 4), tasks.items(), strict=True
    ):
        whole = folder / f"{name}-whole"
        task.begin(whole)
        with Failing(whole, None, 0) as failing:
            done(task.words(whole))
        notes.append(f"{name} has {failing.writes} writes")
        expected = task.result(whole)
        for number in range(share):
            at, fault = 1 + number * failing.writes // share, list(FAULTS)[number % len(FAULTS)]
            place = folder / f"{name}-{number}"
            task.begin(place)
            with Failing(place, at, FAULTS[fault]):
                status, err = call(task.words(place))
            count.cases += 1
            what = f"{name}, {fault} from write {at} on"
            lines = [line for line in err.splitlines() if "error" in line]
            count.expect(status == 1 and len(lines) == 1, f"{what}: status {status}: {err.strip()[-300:]}")
            task.after_kill(place, count)
            status, err = call(task.words(place))
            count.expect(status == 0 and same(task.result(place), expected), f"{what}: {err.strip()[-300:]}")
            shutil.rmtree(place)
    count.notes = ", ".join(notes)
    return count


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system of its own at `place`, over what is there; yields what mounts it again with other options.
    Raises OSError where that is not allowed."""

    def mount(*words: str) -> None:
        ended = subprocess.run(["mount", *words, str(place)], capture_output=True, encoding="utf-8")
        if ended.returncode != 0:
            raise OSError(ended.stderr.strip() or "mount failed")

    place.mkdir(parents=True, exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", options, "torture")
    except FileNotFoundError as error:
        raise OSError("no mount") from error
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def real_disk(folder: Path) -> Count:
    """A disk that is really full, and one that is read-only from the second epoch on; then the run goes on. (One
    that holds an open file cannot be mounted anew, so a read-only one is laid over the checkpoints.)"""
    from mwpb_fast.train import Trainer

    count, real = Count(), Trainer.validate
    done([*SHORT, f"--out={folder / 'whole' / 'run'}"])
    expected = training().result(folder / "whole")
    state = checkpoint.existing(folder / "whole" / "run" / "checkpoints", "last")[0].stat().st_size

    def fails(kind: str, reason: str) -> None:
        status, err = call([*SHORT, f"--out={folder / kind / 'run'}"])
        count.cases += 1
        right = status == 1 and reason in err and len([x for x in err.splitlines() if "error" in x]) == 1
        count.expect(right, f"{kind}: status {status}: {err.strip()[-300:]}")

    def goes_on(kind: str) -> None:
        done([*SHORT, f"--out={folder / kind / 'run'}"])
        count.expect(same(training().result(folder / kind), expected), f"{kind}: another result")

    with small_disk(folder / "full", f"size={int(2.6 * state)}") as remount:
        fails("full", "No space left")
        remount(f"size={1000 * state}")
        goes_on("full")
    checkpoints = folder / "read-only" / "run" / "checkpoints"
    with contextlib.ExitStack() as mounted:

        def then(trainer: Trainer) -> dict[str, Any]:
            if trainer.at.epoch == 2:
                trainer.writer.wait()
                mounted.enter_context(small_disk(checkpoints, "ro"))
            return real(trainer)

        with mock.patch.object(Trainer, "validate", then):
            fails("read-only", "Read-only")
    found = checkpoint.read_newest(checkpoints, "last")
    count.expect(found is not None and found[1]["epoch"] == 2, "read-only: the state before is not whole")
    goes_on("read-only")
    return count
