"""The files of a folder or an archive, read by their names in it."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mwpb_fast.data.dataset import DataError

CORRUPT = (ArithmeticError, LookupError, ValueError, EOFError, OSError, RuntimeError, MemoryError)
CORRUPT += (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)  # type: ignore[assignment]
# what systems and programs leave behind, as they do names that begin with ._
_LEFT_BEHIND = {
    "__macosx", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "@eadir", "#recycle",
    "@recycle", "@__thumb", "$recycle.bin", "system volume information", "lost+found", "__pycache__", ".ds_store",
    ".ipynb_checkpoints", ".thumbnails", ".git",
}  # fmt: skip


class Tree:
    """Named bytes. `names` is sorted and holds posix paths of regular files, `folders` those of all folders, also
    the empty ones; hidden files and what systems leave behind are in neither. `hidden` are those hidden files that
    no system is known to leave behind."""

    def __init__(
        self,
        path: Path,
        members: dict[str, Callable[[], Any]],
        close: Callable[[], None] = lambda: None,
        folders: Iterable[str] = (),
    ) -> None:
        self.path = path
        self._members = members
        self._close = close
        self.names = tuple(sorted(name for name in members if not hidden(name)))
        self.hidden = tuple(sorted(name for name in members if hidden(name) and not left_behind(name)))
        above = {name.rsplit("/", n)[0] for name in self.names for n in range(1, name.count("/") + 1)}
        self.folders = tuple(sorted(above | {name for name in folders if not hidden(name)}))

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self._members = {}
        self._close()

    def label(self, name: str) -> str:
        """The member's name for messages."""
        return str(self.path / name) if self.path.is_dir() else f"{self.path}: {name}"

    def read(self, name: str) -> Any:
        """A member's content, bytes-like."""
        try:
            return self._members[name]()
        except (DataError, MemoryError):
            raise
        except CORRUPT as error:
            raise DataError(f"{self.label(name)}: cannot be read ({reason(error)})") from error

    def text(self, name: str) -> str:
        """A member's content as text; a byte order mark is no part of it."""
        try:
            return bytes(self.read(name)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.label(name)}: not a text file in UTF-8") from error

    def find(self, basename: str) -> str | None:
        """The least deep member of that name, or None. DataError where two are equally deep, or it is a folder."""
        found = [name for name in self.names if name.rsplit("/", 1)[-1] == basename]
        for folder in self.folders if not found else ():
            if folder.rsplit("/", 1)[-1] == basename and "." in basename:
                raise DataError(f"{self.label(folder)}: a folder, where a file is expected")
        return self._least_deep(found)

    def root_of(self, *folders: str) -> str | None:
        """The prefix ("" or ending in "/") below which the least deep folder of one of these names lies, or None.

        Case does not count. DataError where two folders of such a name are equally deep in different ones.
        """
        best = self._least_deep([path for path in self.folders if path.rsplit("/", 1)[-1].lower() in folders])
        return None if best is None else best[: best.rfind("/") + 1]

    def _least_deep(self, names: list[str]) -> str | None:
        depth = min((name.count("/") for name in names), default=0)
        best = [name for name in names if name.count("/") == depth]
        parents = sorted({name[: name.rfind("/") + 1] for name in best})
        if len(parents) > 1:
            raise DataError(f"{self.path}: {best[0]} and {best[1]}: two sets in one; give one of them")
        return min(best, default=None)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())


def hidden(name: str) -> bool:
    """Whether a member is no part of a data set."""
    return left_behind(name) or any(part.startswith(".") for part in name.split("/"))


def left_behind(name: str) -> bool:
    """Whether a system or a program is known to leave such a member behind."""
    return any(part.startswith("._") or part.lower() in _LEFT_BEHIND for part in name.split("/"))
