"""Files of prepared data: a set appears whole or not at all, and is checked against its SHA-256 when read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwpb_fast.data.dataset import DataError, DataWriteError
from mwpb_fast.system.files import honour_umask, sealed, sync, to_json, write_atomically
from mwpb_fast.system.lock import exclusive

_checked: set[tuple[str, str, int, int]] = set()  # what this process has compared: path, SHA-256, size, time


def read_tensors(path: Path, sha256: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The file's tensors of these names, mapped from disk; DataError unless the file has that SHA-256."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    from mwpb_fast.data.download import sha256_of

    try:
        status = path.stat()
        stamp = (str(path.resolve()), sha256, status.st_size, status.st_mtime_ns)
        if stamp not in _checked:
            if sha256_of(path) != sha256:
                raise DataError(
                    f"{path}: damaged (its SHA-256 is not the one in meta.json); prepare the set again, "
                    "with --replace"
                )
            _checked.add(stamp)
        if not _is_text(path):  # safe_open maps the file, but takes a path in UTF-8 only
            tensors = load(path.read_bytes())
            return {key: tensors[key] for key in keys}
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({reason})") from error


def _is_text(path: Path) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


class Staging:
    """The files of a set, written beside their places in `folder`, to be moved there once all are complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[Path, Path] = {}  # from a temporary file to its place

    def write(self, name: str, arrays: dict[str, Any]) -> dict[str, str]:
        """Write arrays as safetensors; returns the file's name and SHA-256."""
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        from mwpb_fast.data.download import sha256_of

        path, temporary = self.folder / name, self.folder / f".{name}.{os.getpid()}.tmp"
        self._written[temporary] = path
        try:
            save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, temporary)
            honour_umask(temporary)
            sync(temporary)
            return {"file": name, "sha256": sha256_of(temporary)}
        except SafetensorError as error:  # a full disk, for one
            raise DataWriteError(f"{path}: cannot be written ({' '.join(str(error).split())})") from error

    def commit(self, meta: dict[str, Any]) -> None:
        """Put the files in their places, and then the description; what an earlier set had besides is removed."""
        description = self.folder / "meta.json"
        description.unlink(missing_ok=True)  # from here on there is no set, until there is the new one
        for temporary, path in self._written.items():
            os.replace(temporary, path)
        for path in self.folder.glob("*.safetensors"):
            if path not in self._written.values():
                path.unlink()
        write_atomically(description, to_json(sealed(meta), indent=1).encode())

    def discard(self) -> None:
        """Remove what is not in its place."""
        for temporary in self._written:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Staging]:
    """The folder of a set, made where it is not there, for this process alone to write to.

    What killed processes left in it is removed. Raises DataWriteError for what the machine cannot do, DataError
    for what the user can mend.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder) as mine:
            if not mine:
                raise DataError(f"{folder}: another process is preparing this set; wait for it")
            for left in folder.glob(".*.tmp"):
                left.unlink()
            stage = Staging(folder)
            try:
                yield stage
            finally:
                stage.discard()
    except OSError as error:
        raise write_error(folder, error) from error


def write_error(path: Path, error: OSError) -> DataError:
    """What a system's error while writing means: the user's to mend where a path is of the wrong kind."""
    wrong = (FileExistsError, NotADirectoryError, IsADirectoryError)
    kind = DataError if isinstance(error, wrong) else DataWriteError
    return kind(f"{error.filename or path}: {error.strerror or error}")
