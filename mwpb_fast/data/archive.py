"""Read-only access to a folder, a tar or a zip by member name, without ever writing a member to disk.

Archives are hostile until shown otherwise. Nothing is extracted, so nothing can escape; members that would
(absolute or climbing paths, symbolic links, devices) are refused all the same, since an archive that holds them
is not the data set that it claims to be, and so is one that expands out of proportion. A hard link is read as
the member before it that it names, and a backslash in a zip as the slash that Windows programs mean by it.
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
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mwpb_fast.data.dataset import DataError
from mwpb_fast.data.foreign import kind_of
from mwpb_fast.data.tree import CORRUPT, Tree, reason

MAX_MEMBERS = 2_000_000
MAX_BYTES = 4 << 30
MAX_RATIO = 100
MIN_ALLOWANCE = 64 << 20  # an archive may always expand to so much

_OPENERS: tuple[tuple[bytes, Callable[..., Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"\xfd7zXZ\x00", lzma.open),
    (b"BZh", bz2.open),
)


def open_tree(path: Path) -> Tree:
    """A folder, a tar (plain, gz, xz, bz2), a zip, or any other single file as a Tree, or DataError."""
    try:
        if path.is_dir():
            return _folder(path)
        if path.exists() and not path.is_file():  # reading a device or a pipe may never end
            raise DataError(f"{path}: not a regular file")
        with path.open("rb") as file:
            head = file.read(512)
        if zipfile.is_zipfile(path):
            return _zip(path)
        for magic, opener in _OPENERS:
            if head.startswith(magic):
                return _tar(path, _inflate(path, opener))
        if head[257:262] == b"ustar" or (head.strip(b"\0") and tarfile.is_tarfile(path)):  # or older than ustar
            with path.open("rb") as file:
                return _tar(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if kind := kind_of(head):
            raise DataError(f"{path}: {kind}")
        return Tree(path, {path.name: path.read_bytes})
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from error


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
    folders: list[str] = []
    above: dict[str, frozenset[tuple[int, int]]] = {}  # the folders that each is in, which a link may lead back to

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(path, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        identity, outside = (status.st_dev, status.st_ino), above.pop(folder, frozenset())
        if identity in outside:  # it would never end
            subfolders.clear()
            continue
        above |= dict.fromkeys((os.path.join(folder, name) for name in subfolders), outside | {identity})
        if folder != str(path):
            folders.append(Path(folder).relative_to(path).as_posix())
        for file in files:
            full = Path(folder, file)
            members[full.relative_to(path).as_posix()] = partial(_read_regular, full)
        if len(members) + len(folders) > MAX_MEMBERS:
            raise DataError(f"{path}: more than {MAX_MEMBERS} files")
    return Tree(path, members, folders=folders)


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
    except (DataError, MemoryError):
        raise
    except CORRUPT as error:
        raise DataError(f"{path}: truncated or corrupt archive ({reason(error)})") from error
    head = bytes(content.getbuffer()[:512])
    content.seek(0)
    if head[257:262] != b"ustar" and not tarfile.is_tarfile(content):
        raise DataError(f"{path}: holds no tar archive but {kind_of(head) or 'something else'}")
    return content


def _tar(path: Path, file: io.BytesIO | mmap.mmap) -> Tree:
    view = file.getbuffer() if isinstance(file, io.BytesIO) else memoryview(file)
    members: dict[str, Callable[[], Any]] = {}
    folders: list[str] = []
    last = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset <= last or len(members) >= MAX_MEMBERS:
                    raise DataError(f"{path}: corrupt archive at member {member.name!r}")
                last = member.offset
                if member.isdir():
                    folders.append(str(PurePosixPath(member.name)))
                    continue
                name = _checked(path, member.name, members)
                if member.islnk():
                    members[name] = _linked(path, member, members)
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{path}: unsafe member {member.name!r} (a symbolic link, device or sparse file)"
                    )
                start, end = member.offset_data, member.offset_data + member.size
                if end > len(view):
                    raise DataError(f"{path}: truncated archive at member {member.name!r}")
                members[name] = partial(view.__getitem__, slice(start, end))
            end_mark = view[tar.offset : tar.offset + 512]
            if len(end_mark) < 512 or any(end_mark):
                raise DataError(f"{path}: truncated archive (no end mark)")
    except DataError:
        raise
    except CORRUPT as error:
        raise DataError(f"{path}: truncated or corrupt archive ({reason(error)})") from error
    return Tree(path, members, folders=folders)


def _linked(path: Path, member: tarfile.TarInfo, members: dict[str, Callable[[], Any]]) -> Callable[[], Any]:
    """The content of the member that a hard link names, which a tar has before it."""
    try:
        return members[str(PurePosixPath(member.linkname))]
    except KeyError:
        raise DataError(
            f"{path}: member {member.name!r} is a hard link to {member.linkname!r}, which is not in the archive "
            "before it"
        ) from None


def _zip(path: Path) -> Tree:
    folders: list[str] = []
    with ExitStack() as on_failure:
        try:
            archive = on_failure.enter_context(zipfile.ZipFile(path))
            members = _zip_members(path, archive, folders)
        except DataError:
            raise
        except CORRUPT as error:
            raise DataError(f"{path}: truncated or corrupt archive ({reason(error)})") from error
        on_failure.pop_all()
    return Tree(path, members, archive.close, folders)


def _zip_members(path: Path, archive: zipfile.ZipFile, folders: list[str]) -> dict[str, Callable[[], Any]]:
    members: dict[str, Callable[[], Any]] = {}
    limit = _allowance(path)
    total = 0
    for info in archive.infolist():
        name = info.orig_filename.replace("\\", "/")
        if name.endswith("/"):
            folders.append(str(PurePosixPath(name)))
            continue
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise DataError(f"{path}: unsafe member {info.filename!r} (a link or device)")
        if info.flag_bits & 1:
            raise DataError(f"{path}: member {info.filename!r} is encrypted")
        total += info.file_size
        if total > limit:
            raise _bomb(path, limit)
        members[_checked(path, name, members)] = partial(archive.read, info)
    return members
