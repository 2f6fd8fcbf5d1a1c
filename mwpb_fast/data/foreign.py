"""What a file is that is none of the forms that are read, said from its first bytes, with the cure."""

from __future__ import annotations

_UNPACK = "; unpack it and give the folder"
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a truncated zip archive (its list of members, at the end, is missing); fetch it again"),
    (b"Rar!\x1a\x07", "a rar archive" + _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive" + _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive" + _UNPACK),
    (b"\x04\x22\x4d\x18", "an lz4 archive" + _UNPACK),
    (b"LZIP", "an lzip archive" + _UNPACK),
    (b"\x5d\x00\x00", "an lzma archive" + _UNPACK),
    (b"\x1f\x9d", "a file of `compress`" + _UNPACK),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1", "a Parquet file"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for; run `git lfs pull`"),
)
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body")


def kind_of(head: bytes) -> str | None:
    """What a file with these first bytes is, as the end of a message; None where nothing is known of it."""
    if not head:
        return "an empty file; fetch it again"
    for magic, kind in _KINDS:
        if head.startswith(magic):
            return kind
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(_PAGES):
        return "an HTML page, which a server sent in place of the file; fetch it again"
    if start.startswith(b"<?xml"):
        return "an XML document, perhaps a server's error message; fetch it again"
    return None
