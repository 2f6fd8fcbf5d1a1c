"""Downloads that resume, try each mirror, and are checked by size and SHA-256 before they count."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mwpb_fast.data.dataset import DataError

Progress = Callable[[str, int, int], None]  # file name, bytes done, bytes in all

MIRROR_VARIABLE = "MWPB_DATA_MIRROR"
_TRIES, _TIMEOUT, _CHUNK = 3, 30, 1 << 20
_FAILURES = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Download:
    """A file that can be fetched: where from, and what it must be."""

    filename: str
    urls: tuple[str, ...]
    sha256: str
    size: int


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(item: Download, folder: Path, progress: Progress | None = None) -> Path:
    """The path of the file in `folder`, downloaded if it is not there; DataError if no mirror has it.

    A partial file is continued. The base address in the environment variable MWPB_DATA_MIRROR, if set, is
    tried before the known ones.
    """
    target = folder / item.filename
    if target.is_file() and target.stat().st_size == item.size and sha256_of(target) == item.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{item.filename}.part"
    base = os.environ.get(MIRROR_VARIABLE)
    urls = ((f"{base.rstrip('/')}/{item.filename}",) if base else ()) + item.urls
    problems = []
    for url in urls:
        problem = ""
        for attempt in range(_TRIES):
            try:
                _receive(url, partial, item, progress)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                break
            except _FAILURES as error:
                problem = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
                time.sleep(min(attempt, 1))
                continue
            if partial.stat().st_size == item.size and sha256_of(partial) == item.sha256:
                os.replace(partial, target)
                return target
            problem = "size or SHA-256 differs"
            partial.unlink()
        problems.append(f"{url}: {problem}")
    raise DataError(
        f"{item.filename}: download failed ({'; '.join(problems)}); fetch it yourself and use --data-dir"
    )


def _receive(url: str, partial: Path, item: Download, progress: Progress | None) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    if done >= item.size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "mwpb-fast"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
        if reply.status != 206:
            done = 0
        with partial.open("ab" if done else "wb") as file:
            while chunk := reply.read(min(_CHUNK, item.size + 1 - done)):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(item.filename, done, item.size)
    if done < item.size:
        raise ConnectionError(f"connection closed at {done} of {item.size} bytes")
