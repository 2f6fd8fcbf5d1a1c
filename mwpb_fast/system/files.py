"""Files that are whole, so that a crash leaves either the old or the new one, and JSON that any reader takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that at any moment either the old file or the whole new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # made with the mode of any new file: looking at the umask would change it for every other thread meanwhile
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync(path.parent)


def honour_umask(path: Path) -> None:
    """Give a file that was made for its owner alone, as temporary files are, the mode of any new file. Not to be
    called while another thread makes files."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(content: Any, indent: int | None = None) -> str:
    """`content` as JSON, which has no NaN and no infinity: null stands for them."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, to be written as JSON, with a SHA-256 of itself, by which `is_whole` notices a changed bit."""
    return {**content, "sha256": _digest(content)}


def is_whole(content: dict[str, Any]) -> bool:
    """Whether what was read is as `sealed` made it, or of a version that did not seal; takes off the seal."""
    seal = content.pop("sha256", None)
    return seal is None or seal == _digest(content)


def _digest(content: Mapping[str, Any]) -> str:
    as_read = json.loads(to_json(content))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content
