"""A run's folder: for one process at a time, and cleared of an earlier run where one is begun anew."""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwpb_fast.config import ConfigError, yaml_file
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import write_environment
from mwpb_fast.system.files import write_atomically
from mwpb_fast.system.lazy import torch
from mwpb_fast.system.lock import exclusive

# These are the names that a run, its evaluations and its pictures give to their files.
_POINT = r"(best|last)-\d{5}-\d{7}"
_KIND = rf"(best|last|{_POINT})"
# of training alone
_OWN = r"config\.yaml|hang(-\d+)?\.txt|metrics(-damaged)?\.jsonl|(environment|engine|radii)\.json"
_RESULT = (
    rf"{_OWN}|results\.json|(curves|radii)\.png|report\.html|(evaluation|trust)-{_KIND}(-preview)?\.(json|md)"
)
_STATE = rf"{_POINT}\.(pt(\.sha256)?|safetensors)"
_CHECKPOINT = rf"{_STATE}|{_RESULT}"  # results too, of a checkpoint that was evaluated by its name
_SHARD = r"[\w-]+-[0-9a-f]{12}(-\d{5}\.json|\.lock)"
# No writing of a result takes as many seconds.
_STALE = 3600.0
_EVENTS = r"events\.out\.tfevents\..*"


@contextlib.contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """The folder for this process alone.

    It is made where it is not there. Raises ConfigError where another process has it, OSError where it is none.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(folder))
    # A folder that cannot be written is found at the start.
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "train.lock") as mine:
        if not mine:
            raise ConfigError(
                f"{folder}: another process is training this run; wait for it, or take another --out"
            )
        yield


def prepare(folder: Path, anew: bool) -> None:
    """Clear the folder where a run is begun `anew`, and sweep it."""
    if anew:
        clear(folder)
    sweep(folder)


def describe(folder: Path, config: dict[str, Any], device: torch.device, anew: bool) -> None:
    """Write what the run is, config.yaml, and what it runs on, environment.json. config: as `to_dict` gives it.
    anew: the run is at its beginning, and has no records."""
    if anew:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    write_atomically(folder / "config.yaml", yaml_file.write(config))
    write_environment(folder, device)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of their writing; to be called by the one that holds the folder. An
    evaluation holds nothing and may be writing now, so what is left of one goes when it is old."""
    own = {folder: _OWN, folder / "checkpoints": _STATE}
    shards = [path for path in folder.glob("evaluation-*") if path.is_dir()]
    for place in (*own, *shards):
        for path in place.glob(".*.tmp"):
            mine = place in own and re.fullmatch(rf"\.({own[place]})\.\w+\.tmp", path.name)
            theirs = re.fullmatch(rf"\.({_RESULT}|{_SHARD})\.\w+\.tmp", path.name)
            with contextlib.suppress(OSError):  # Its writer may just have finished.
                if mine or (theirs and time.time() - path.stat().st_mtime > _STALE):
                    path.unlink()
    checkpoint.sweep(folder / "checkpoints")


def clear(folder: Path) -> None:
    """Remove what a run left in `folder`: checkpoints, records, results and pictures, and nothing else."""
    checkpoints, events = folder / "checkpoints", folder / "tensorboard"
    found = [path for place in (folder, checkpoints) for path in place.glob("evaluation-*")]
    shards = [path for path in found if re.fullmatch(f"evaluation-{_KIND}", path.name)]
    own = {folder: _RESULT, checkpoints: _CHECKPOINT, events: _EVENTS} | dict.fromkeys(shards, _SHARD)
    for place, names in own.items():
        for path in place.glob("*"):
            # A killed process may have left a part of one of them, in a temporary file.
            if re.fullmatch(rf"{names}|\.({names})\.\w+\.tmp", path.name) and not path.is_dir():
                path.unlink()
    for place in (*shards, events):
        with contextlib.suppress(OSError):  # Something of the user's may be in it.
            place.rmdir()
