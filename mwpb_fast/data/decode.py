"""What the readers of data sets hand over, and the decoding of image files into one uint8 array."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mwpb_fast.data.dataset import DataError

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Arrays:
    """images: uint8 (N, H, W, C); labels: int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Image files: each one's name (for messages), its content, and its label."""

    names: Sequence[str]
    contents: Sequence[Any]
    labels: np.ndarray


@dataclass(frozen=True)
class RawSet:
    """A data set as read. origin: for messages; channels: 0 = as the files say; size: (width, height)."""

    classes: tuple[str, ...]
    train: Arrays | Encoded
    test: Arrays | Encoded
    origin: str
    channels: int = 3
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Packed:
    """Image files end to end: file i is data[offsets[i]:offsets[i + 1]]; uint8 (n,) and int64 (N + 1,)."""

    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.data[self.offsets[i] : self.offsets[i + 1]]


def pack(encoded: Encoded) -> Packed:
    """The contents end to end."""
    offsets = np.zeros(len(encoded.contents) + 1, dtype=np.int64)
    np.cumsum([len(content) for content in encoded.contents], out=offsets[1:])
    data = np.empty(offsets[-1], dtype=np.uint8)
    for i, content in enumerate(encoded.contents):
        data[offsets[i] : offsets[i + 1]] = np.frombuffer(content, dtype=np.uint8)
    return Packed(data, offsets)


def count_channels(encoded: Encoded) -> int:
    """1 if all files are grayscale, else 3; reads headers only."""
    for name, content in zip(encoded.names, encoded.contents, strict=True):
        if _open(name, content).mode not in ("1", "L"):
            return 3
    return 1


def decode(encoded: Encoded, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """All files as uint8 (N, H, W, channels), by Pillow in threads; grayscale becomes RGB if channels is 3.

    size: the (width, height) that every file must have, by default that of the first. Raises DataError that
    names the first file that is not an image of this size.
    """
    count = len(encoded.contents)
    size = _open(encoded.names[0], encoded.contents[0]).size if size is None else size
    out = np.empty((count, size[1], size[0], channels), dtype=np.uint8)
    mode = "RGB" if channels == 3 else "L"

    def work(part: range) -> None:
        for i in part:
            name = encoded.names[i]
            image = _open(name, encoded.contents[i])
            if image.size != size:
                raise DataError(f"{name}: is {_by(image.size)}, the images of this set are {_by(size)}")
            if image.mode not in _MODES:
                raise DataError(f"{name}: pixel format {image.mode} is not supported, only 8 bits a channel")
            try:
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
            except Exception as error:
                raise DataError(f"{name}: broken image ({' '.join(str(error).split())})") from error
            out[i] = pixels.reshape(out.shape[1:])

    chunk = 512
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(work, range(i, min(i + chunk, count))) for i in range(0, count, chunk)]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return out


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _open(name: str, content: Any) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:
        raise DataError(f"{name}: not an image") from error
