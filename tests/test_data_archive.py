"""Archives: honest ones read back, hostile and broken ones are refused, and nothing is ever written."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mwpb_fast.data import DataError, archive
from mwpb_fast.data.archive import open_tree

CONTENT = {"set/train/a/0.png": b"zero", "set/train/b/1.png": b"one" * 400, "set/wnids.txt": b"a\nb\n"}


def tar_bytes(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in members:
            if isinstance(member, tuple):
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
            else:
                tar.addfile(member)
    return out.getvalue()


def special(kind: bytes, name: str = "set/odd", link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_bytes(*members: tuple[str | zipfile.ZipInfo, bytes], stored: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return out.getvalue()


def zip_link() -> bytes:
    info = zipfile.ZipInfo("set/link")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return zip_bytes((info, b"/etc/passwd"))


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


def fixed_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def negative_size() -> bytes:
    content = tar_bytes(("set/a", b"x" * 600))
    header = content[:124] + b"\xff" * 12 + content[136:512]  # base-256, minus one
    return fixed_checksum(header) + content[512:]


def huge_size() -> bytes:
    content = tar_bytes(("set/a", b"x"))
    header = content[:124] + b"77777777777\0" + content[136:512]
    return fixed_checksum(header) + content[512:]


def sparse() -> bytes:
    header = bytearray(special(tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"77777777777\0"
    return fixed_checksum(bytes(header)) + bytes(1024)


def encrypted() -> bytes:
    content = bytearray(zip_bytes(("set/a", b"secret")))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.index(mark) + offset
        content[place : place + 2] = struct.pack("<H", 1)
    return bytes(content)


ZEROS = bytes(3 << 20)
GOOD_TAR = tar_bytes(*CONTENT.items())
HOSTILE: dict[str, Callable[[], bytes]] = {
    "tar-absolute": lambda: tar_bytes(("/tmp/escaped", b"x")),
    "tar-climbing": lambda: tar_bytes(("../escaped", b"x")),
    "tar-climbing-inside": lambda: tar_bytes(("set/../../escaped", b"x")),
    "tar-backslash": lambda: tar_bytes(("set\\..\\..\\escaped", b"x")),
    "tar-drive": lambda: tar_bytes(("C:/escaped", b"x")),
    "tar-symlink": lambda: tar_bytes(special(tarfile.SYMTYPE, link="/etc/passwd")),
    "tar-symlink-then-file": lambda: tar_bytes(special(tarfile.SYMTYPE, "d", "/tmp"), ("d/escaped", b"x")),
    "tar-hardlink": lambda: tar_bytes(special(tarfile.LNKTYPE, link="/etc/passwd")),
    "tar-character-device": lambda: tar_bytes(special(tarfile.CHRTYPE)),
    "tar-block-device": lambda: tar_bytes(special(tarfile.BLKTYPE)),
    "tar-fifo": lambda: tar_bytes(special(tarfile.FIFOTYPE)),
    "tar-sparse": sparse,
    "tar-twice": lambda: tar_bytes(("set/a", b"x"), ("./set/a", b"y")),
    "tar-negative-size": negative_size,
    "tar-huge-size": huge_size,
    "tar-truncated-member": lambda: GOOD_TAR[:1300],
    "tar-truncated-between-members": lambda: GOOD_TAR[:1024],
    "gz-bomb": lambda: gzip.compress(tar_bytes(("set/a", ZEROS))),
    "gz-truncated": lambda: gzip.compress(GOOD_TAR)[:-9],
    "gz-corrupt": lambda: patched(gzip.compress(GOOD_TAR, 0), b"one" * 100, b"two" * 100),
    "gz-of-no-tar": lambda: gzip.compress(b"hello" * 300),
    "zip-absolute": lambda: zip_bytes(("/tmp/escaped", b"x")),
    "zip-climbing": lambda: zip_bytes(("../escaped", b"x")),
    "zip-backslash": lambda: zip_bytes(("set\\..\\..\\escaped", b"x")),
    "zip-symlink": zip_link,
    "zip-twice": lambda: zip_bytes(("set/a", b"x"), ("set/./a", b"y")),
    "zip-bomb": lambda: zip_bytes(("set/a", ZEROS)),
    "zip-many-bombs": lambda: zip_bytes(*((f"set/{i}", bytes(300_000)) for i in range(8))),
    "zip-encrypted": encrypted,
    "zip-corrupt": lambda: patched(zip_bytes(("set/a", b"one" * 99), stored=True), b"one" * 99, b"two" * 99),
    "zip-lying-size": lambda: patched(
        zip_bytes(("set/a", b"x" * 999)), struct.pack("<L", 999), struct.pack("<L", 12)
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MIN_ALLOWANCE", 1 << 20)
    path = tmp_path / "inside" / "hostile"
    path.parent.mkdir()
    path.write_bytes(HOSTILE[kind]())
    monkeypatch.chdir(path.parent)
    with pytest.raises(DataError, match="hostile") as caught, open_tree(path) as tree:  # noqa: PT012
        for name in tree.names:
            tree.read(name)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["inside", "hostile"]
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2", "zip", "folder"])
def test_honest_sources_read_back(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "source"
    extra = {"__MACOSX/set/._a": b"junk", "set/.DS_Store": b"junk"}
    if mode == "folder":
        for name, content in {**CONTENT, **extra}.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif mode == "zip":
        path.write_bytes(zip_bytes(*CONTENT.items(), *extra.items()))
    else:
        with tarfile.open(path, mode) as tar:
            tar.addfile(special(tarfile.DIRTYPE, "set"))
            for name, content in {**CONTENT, **extra}.items():
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with open_tree(path) as tree:
        assert {name: bytes(tree.read(name)) for name in tree.names} == CONTENT
        assert tree.find("wnids.txt") == "set/wnids.txt"
        assert tree.find("nothing") is None
        assert tree.root_of("train") == "set/"
        assert tree.root_of("set") == ""
        assert tree.root_of("val") is None


def test_a_folder_with_a_loop_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x")
    (tmp_path / "a" / "back").symlink_to(tmp_path, target_is_directory=True)
    with open_tree(tmp_path) as tree:
        assert tree.names == ("a/file",)


def test_a_fifo_in_a_folder_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open_tree(tmp_path) as tree, pytest.raises(DataError, match="not a regular file"):
        tree.read("pipe")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: No such file"):
        open_tree(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    for path in (Path(os.devnull), tmp_path / "pipe"):
        with pytest.raises(DataError, match="not a regular file"):
            open_tree(path)
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty: an empty file"):
        open_tree(tmp_path / "empty")
    (tmp_path / "some.mat").write_bytes(b"MATLAB 5.0")
    with open_tree(tmp_path / "some.mat") as tree:
        assert tree.names == ("some.mat",)


ZIP = zip_bytes(*CONTENT.items())
FOREIGN = {
    "truncated zip": (ZIP[:-40], "a truncated zip archive"),
    "html": (b"\xef\xbb\xbf\n<!DOCTYPE html><html><title>404</title>", "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(99), "a rar archive; unpack it and give the folder"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive"),
    "zst": (b"\x28\xb5\x2f\xfd" + bytes(99), "a Zstandard archive"),
    "lzma": (b"\x5d\x00\x00\x80\x00" + bytes(99), "an lzma archive"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(99), "an lz4 archive"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
    "html in gzip": (gzip.compress(b"<html><body>Not found</body></html>"), "no tar archive but an HTML page"),
    "empty gzip": (gzip.compress(b""), "no tar archive but an empty file"),
    "text in gzip": (gzip.compress(b"hello " * 300), "no tar archive but something else"),
    "truncated xz": (lzma.compress(GOOD_TAR)[:-20], "truncated or corrupt archive"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_archive_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    content, named = FOREIGN[kind]
    path = tmp_path / "set.zip"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"set.zip: .*{named}") as caught:
        open_tree(path)
    assert "\n" not in str(caught.value)


def test_a_tar_older_than_ustar_is_read(tmp_path: Path) -> None:
    content = bytearray(tar_bytes(("set/a", b"x")))
    content[257:265] = bytes(8)
    (tmp_path / "old.tar").write_bytes(fixed_checksum(bytes(content[:512])) + bytes(content[512:]))
    with open_tree(tmp_path / "old.tar") as tree:
        assert bytes(tree.read("set/a")) == b"x"


def test_backslashes_in_a_zip_are_slashes(tmp_path: Path) -> None:
    members = [(name.replace("/", "\\"), content) for name, content in CONTENT.items()]
    (tmp_path / "windows.zip").write_bytes(zip_bytes(("set\\train\\c\\", b""), *members))
    with open_tree(tmp_path / "windows.zip") as tree:
        assert {name: bytes(tree.read(name)) for name in tree.names} == CONTENT
        assert tree.folders == ("set", "set/train", "set/train/a", "set/train/b", "set/train/c")


def test_hard_links_in_a_tar_are_read(tmp_path: Path) -> None:
    link = special(tarfile.LNKTYPE, "set/again", "./set/a")
    (tmp_path / "links.tar").write_bytes(tar_bytes(("set/a", b"one"), link))
    with open_tree(tmp_path / "links.tar") as tree:
        assert {name: bytes(tree.read(name)) for name in tree.names} == {"set/a": b"one", "set/again": b"one"}
    (tmp_path / "bad.tar").write_bytes(tar_bytes(link, ("set/a", b"one")))
    with pytest.raises(DataError, match=r"'set/again' is a hard link to './set/a', which is not in the archive"):
        open_tree(tmp_path / "bad.tar")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_what_systems_leave_behind_is_not_there(form: str, tmp_path: Path) -> None:
    left = ["Thumbs.db", "DESKTOP.INI", ".DS_Store", "@eaDir/0.png", "._0.png", "__MACOSX/._0.png"]
    extra = {f"set/train/a/{name}": b"junk" for name in left} | {"set/train/@eaDir/a/0.png": b"junk"}
    hidden = {"set/train/.mine/0.png": b"mine"}
    path = tmp_path / "source"
    if form == "zip":
        path.write_bytes(zip_bytes(*CONTENT.items(), *extra.items(), *hidden.items()))
    else:
        for name, content in {**CONTENT, **extra, **hidden}.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    with open_tree(path) as tree:
        assert tree.names == tuple(sorted(CONTENT))
        assert tree.folders == ("set", "set/train", "set/train/a", "set/train/b")
        assert tree.hidden == tuple(hidden)


def test_two_sets_in_one_are_refused(tmp_path: Path) -> None:
    files = {name.replace("set/", f"{copy}/"): content for copy in ("x", "y") for name, content in CONTENT.items()}
    (tmp_path / "two.zip").write_bytes(zip_bytes(*files.items()))
    with open_tree(tmp_path / "two.zip") as tree:
        for look in (lambda: tree.find("wnids.txt"), lambda: tree.root_of("train")):
            with pytest.raises(DataError, match=r"two\.zip: x/.* and y/.*: two sets in one"):
                look()


def test_a_folder_where_a_file_is_expected_is_named(tmp_path: Path) -> None:
    (tmp_path / "train_32x32.mat").mkdir()
    with open_tree(tmp_path) as tree, pytest.raises(DataError, match=r"train_32x32\.mat: a folder, where a file"):
        tree.find("train_32x32.mat")


def test_one_folder_by_two_links_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0.png").write_bytes(b"x")
    for name in ("one", "two"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).symlink_to(tmp_path / "real", target_is_directory=True)
    with open_tree(tmp_path / "set") as tree:
        assert tree.names == ("one/0.png", "two/0.png")
