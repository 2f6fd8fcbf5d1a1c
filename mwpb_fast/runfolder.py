"""A run's folder: for one process at a time, and cleared of an earlier run where one is begun anew."""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path

from mwpb_fast.config import ConfigError

# the names that a run, its evaluations and its pictures give to their files
_POINT = r"(best|last)-\d{5}-\d{7}"
_KIND = rf"(best|last|{_POINT})"
_RESULT = (
    r"config\.yaml|metrics\.jsonl|(environment|engine|radii|results)\.json|(curves|radii)\.png"
    rf"|(evaluation|trust)-{_KIND}\.(json|md)"
)
_CHECKPOINT = rf"{_POINT}\.pt(\.sha256)?|{_RESULT}"  # results too, of a checkpoint that was evaluated by its name
_SHARD = r"[\w-]+-[0-9a-f]{12}-\d{5}\.json"
_EVENTS = r"events\.out\.tfevents\..*"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone; the system lets go of it however the process ends.

    Raises ConfigError where another process has it.
    """
    with (folder / "train.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another process is training this run; wait for it, or take another --out"
            ) from error
        except OSError:  # a file system that has no locks
            pass
        yield


def clear(folder: Path) -> None:
    """Remove what a run left in `folder`: checkpoints, records, results and pictures, and nothing else."""
    checkpoints, events = folder / "checkpoints", folder / "tensorboard"
    found = [path for place in (folder, checkpoints) for path in place.glob("evaluation-*")]
    shards = [path for path in found if re.fullmatch(f"evaluation-{_KIND}", path.name)]
    own = {folder: _RESULT, checkpoints: _CHECKPOINT, events: _EVENTS} | dict.fromkeys(shards, _SHARD)
    for place, names in own.items():
        for path in place.glob("*"):
            # or what a killed process left of writing one of them
            if re.fullmatch(rf"{names}|\.({names})\.\w+\.tmp", path.name) and not path.is_dir():
                path.unlink()
    for place in (*shards, events):
        with contextlib.suppress(OSError):  # something of the user's is in it
            place.rmdir()
