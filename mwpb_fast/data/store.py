"""Files of prepared data: written whole or not at all, and checked against their SHA-256 when read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mwpb_fast.data.dataset import DataError

_checked: set[tuple[str, str, int, int]] = set()  # what this process has compared: path, SHA-256, size, time


def read_tensors(path: Path, sha256: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The file's tensors of these names, mapped from disk; DataError unless the file has that SHA-256."""
    from safetensors import safe_open

    from mwpb_fast.data.download import sha256_of

    try:
        status = path.stat()
        stamp = (str(path.resolve()), sha256, status.st_size, status.st_mtime_ns)
        if stamp not in _checked:
            if sha256_of(path) != sha256:
                raise DataError(
                    f"{path}: damaged (its SHA-256 is not the one in meta.json); prepare the set again"
                )
            _checked.add(stamp)
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except DataError:
        raise
    except Exception as error:  # safetensors has an exception class of its own
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error


def save_arrays(path: Path, arrays: dict[str, Any]) -> dict[str, str]:
    """Write arrays as safetensors; returns the file's name and SHA-256."""
    import numpy as np
    from safetensors.numpy import save_file

    from mwpb_fast.data.download import sha256_of

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, temporary)
        digest = sha256_of(temporary)
        _commit(temporary, path)
    except Exception as error:  # as above; a full disk, for one
        raise DataError(f"{path}: cannot be written ({' '.join(str(error).split())})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": path.name, "sha256": digest}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it has all of `content`, or is as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        _commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _commit(temporary: Path, path: Path) -> None:
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
