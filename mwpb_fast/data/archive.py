"""Read-only access to a folder, a tar or a zip by member name, without ever writing a member to disk.

Archives are hostile until shown otherwise. Nothing is extracted, so nothing can escape; members that would
(absolute or climbing paths, links, devices) are refused all the same, since an archive that holds them is
not the data set that it claims to be, and so is one that expands out of proportion.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import mmap
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mwpb_fast.data.dataset import DataError

MAX_MEMBERS = 2_000_000
MAX_BYTES = 4 << 30
MAX_RATIO = 100
MIN_ALLOWANCE = 64 << 20  # an archive may always expand to so much

_CORRUPT = (ArithmeticError, LookupError, ValueError, EOFError, OSError, RuntimeError, MemoryError)
_CORRUPT += (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)  # type: ignore[assignment]
_OPENERS: tuple[tuple[bytes, Callable[..., Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"\xfd7zXZ\x00", lzma.open),
    (b"BZh", bz2.open),
)


class Tree:
    """Named bytes. `names` is sorted and holds posix paths of regular files; hidden files are left out."""

    def __init__(self, path: Path, members: dict[str, Callable[[], Any]], close: Callable[[], None]) -> None:
        self.path = path
        self._members = members
        self._close = close
        self.names = tuple(sorted(name for name in members if not _hidden(name)))

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
        except DataError:
            raise
        except _CORRUPT as error:
            raise DataError(f"{self.label(name)}: cannot be read ({_reason(error)})") from error

    def find(self, basename: str) -> str | None:
        """The least deep member of that name, or None."""
        found = [name for name in self.names if name.rsplit("/", 1)[-1] == basename]
        return min(found, key=lambda name: (name.count("/"), name), default=None)

    def root_of(self, folder: str) -> str | None:
        """The prefix ("" or ending in "/") below which the least deep folder of that name lies, or None."""
        prefixes = {f"/{name}".split(f"/{folder}/", 1)[0] for name in self.names if f"/{folder}/" in f"/{name}"}
        best = min(prefixes, key=lambda prefix: (prefix.count("/"), prefix), default=None)
        return None if best is None else f"{best}/".lstrip("/")


def open_tree(path: Path) -> Tree:
    """A folder, a tar (plain, gz, xz, bz2), a zip, or any other single file as a Tree, or DataError."""
    try:
        if path.is_dir():
            return _folder(path)
        with path.open("rb") as file:
            head = file.read(512)
        if zipfile.is_zipfile(path):
            return _zip(path)
        for magic, opener in _OPENERS:
            if head.startswith(magic):
                return _tar(path, _inflate(path, opener))
        if head[257:262] == b"ustar":
            with path.open("rb") as file:
                return _tar(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return Tree(path, {path.name: path.read_bytes}, lambda: None)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _allowance(path: Path) -> int:
    return min(MAX_BYTES, max(MIN_ALLOWANCE, MAX_RATIO * path.stat().st_size))


def _bomb(path: Path, limit: int) -> DataError:
    return DataError(
        f"{path}: expands to more than {limit >> 20} MiB; unpack it and give the folder if that is meant"
    )


def _checked(path: Path, name: str, members: dict[str, Callable[[], Any]]) -> str:
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or name[1:2] == ":" or pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"{path}: unsafe member path {name!r}")
    if str(pure) in members:
        raise DataError(f"{path}: two members are named {name!r}")
    if len(members) >= MAX_MEMBERS:
        raise DataError(f"{path}: more than {MAX_MEMBERS} members")
    return str(pure)


def _folder(path: Path) -> Tree:
    members: dict[str, Callable[[], Any]] = {}
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(path, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above would never end
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for file in files:
            full = Path(folder, file)
            members[full.relative_to(path).as_posix()] = partial(_read_regular, full)
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{path}: more than {MAX_MEMBERS} files")
    return Tree(path, members, lambda: None)


def _read_regular(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path}: not a regular file")
    return path.read_bytes()


def _inflate(path: Path, opener: Callable[..., Any]) -> io.BytesIO:
    limit = _allowance(path)
    content = io.BytesIO()
    try:
        with opener(path, "rb") as stream:
            while chunk := stream.read(4 << 20):
                if content.tell() + len(chunk) > limit:
                    raise _bomb(path, limit)
                content.write(chunk)
    except DataError:
        raise
    except _CORRUPT as error:
        raise DataError(f"{path}: truncated or corrupt archive ({_reason(error)})") from error
    content.seek(0)
    return content


def _tar(path: Path, file: io.BytesIO | mmap.mmap) -> Tree:
    view = file.getbuffer() if isinstance(file, io.BytesIO) else memoryview(file)
    members: dict[str, Callable[[], Any]] = {}
    last = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset <= last or len(members) >= MAX_MEMBERS:
                    raise DataError(f"{path}: corrupt archive at member {member.name!r}")
                last = member.offset
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{path}: unsafe member {member.name!r} (a link, device or sparse file)")
                start, end = member.offset_data, member.offset_data + member.size
                if end > len(view):
                    raise DataError(f"{path}: truncated archive at member {member.name!r}")
                members[_checked(path, member.name, members)] = partial(view.__getitem__, slice(start, end))
            end_mark = view[tar.offset : tar.offset + 512]
            if len(end_mark) < 512 or any(end_mark):
                raise DataError(f"{path}: truncated archive (no end mark)")
    except DataError:
        raise
    except _CORRUPT as error:
        raise DataError(f"{path}: truncated or corrupt archive ({_reason(error)})") from error
    return Tree(path, members, lambda: None)


def _zip(path: Path) -> Tree:
    with ExitStack() as on_failure:
        try:
            archive = on_failure.enter_context(zipfile.ZipFile(path))
            members = _zip_members(path, archive)
        except DataError:
            raise
        except _CORRUPT as error:
            raise DataError(f"{path}: truncated or corrupt archive ({_reason(error)})") from error
        on_failure.pop_all()
    return Tree(path, members, archive.close)


def _zip_members(path: Path, archive: zipfile.ZipFile) -> dict[str, Callable[[], Any]]:
    members: dict[str, Callable[[], Any]] = {}
    limit = _allowance(path)
    total = 0
    for info in archive.infolist():
        if info.is_dir():
            continue
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise DataError(f"{path}: unsafe member {info.filename!r} (a link or device)")
        if info.flag_bits & 1:
            raise DataError(f"{path}: member {info.filename!r} is encrypted")
        total += info.file_size
        if total > limit:
            raise _bomb(path, limit)
        name = _checked(path, info.orig_filename, members)
        members[name] = partial(archive.read, info)
    return members
