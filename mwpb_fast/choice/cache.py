"""Choices of earlier starts, so that the next one in the same circumstances costs nothing.

There is a file for each circumstances, in MWPB_CACHE, else in `mwpb-fast` of the user's folder of caches. What is
read is taken only where it names the very circumstances; a file that is damaged is passed over, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwpb_fast.choice.record import Record, read_record
from mwpb_fast.runs.log import note
from mwpb_fast.system.files import to_json, write_atomically


def folder() -> Path:
    """Where choices are kept."""
    if own := os.environ.get("MWPB_CACHE"):
        return Path(os.path.expanduser(own)) / "engine"
    usual = Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "mwpb-fast" / "engine"


def read(circumstances: dict[str, Any]) -> Record | None:
    """The choice made in these circumstances, if there is one."""
    path = _path(circumstances)
    try:
        record = read_record(json.loads(path.read_text(encoding="utf-8")))
        if record.circumstances != circumstances:
            raise ValueError("it is of other circumstances")
        return record
    except FileNotFoundError:
        return None
    except OSError as error:
        note(f"engine: the cache's {path}: {error.strerror}; a trial is made")
    except (ValueError, RecursionError) as error:
        note(f"engine: the cache's {path} is damaged ({error}); a trial is made")
    return None


def write(record: Record) -> None:
    """Keep a choice; where that cannot be, it is said."""
    path = _path(record.circumstances)
    try:
        write_atomically(path, to_json(record.plain(), indent=1).encode())
    except OSError as error:
        note(f"engine: the choice is not kept for the next start: {path}: {error.strerror}")


def kept() -> Iterator[Record]:
    """All choices that can be read, the newest first."""
    try:
        paths = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return
    for path in paths:
        try:
            yield read_record(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            continue


def _path(circumstances: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
    return folder() / f"{digest[:32]}.json"
