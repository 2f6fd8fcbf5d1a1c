"""What the readers of data sets hand over, and the decoding of image files into one uint8 array."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mwpb_fast.data.dataset import DataError
from mwpb_fast.data.fit import Fit, by
from mwpb_fast.data.foreign import kind_of

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp")
_ORIENTATION = 0x0112
_AS_IT_IS = Fit()
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
    """A data set as read. origin: for messages; channels: 0 = as the files say; size: (width, height).
    notes: what the user is to know of what was read and what was not, a line each."""

    classes: tuple[str, ...]
    train: Arrays | Encoded
    test: Arrays | Encoded
    origin: str
    channels: int = 3
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


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


def decode(
    encoded: Encoded,
    channels: int,
    size: tuple[int, int] | None = None,
    fit: Fit = _AS_IT_IS,
    tell: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """All files as uint8 (N, H, W, channels), by Pillow in threads; grayscale becomes RGB if channels is 3.

    size: the (width, height) that every file must have, by default that of the first. fit: brings them to one.
    EXIF orientation is not applied. tell: called with a line about what the pixels do not show of the files.
    Raises DataError that names the first file that is not an image of this size.
    """
    count = len(encoded.contents)
    first = encoded.names[0]
    size = size or fit.size(first, _open(first, encoded.contents[0]).size)
    out = np.empty((count, size[1], size[0], channels), dtype=np.uint8)
    mode = "RGB" if channels == 3 else "L"

    def work(part: range) -> list[tuple[str, str]]:
        remarks = []
        for i in part:
            name = encoded.names[i]
            image = _open(name, encoded.contents[i])
            if image.mode not in _MODES or _is_deep(image):
                raise DataError(f"{name}: pixel format {_format(image)} is not supported, only 8 bits a channel")
            if (found := fit.size(name, image.size)) != size:
                cure = "--crop too" if fit else "--resize, --crop or both"
                raise DataError(
                    f"{name}: is {by(found)}, the images of this set are {by(size)}; {cure} can make them one size"
                )
            try:
                converted = image if image.mode == mode else image.convert(mode)
                pixels = np.asarray(fit.apply(converted))
                remarks += [(remark, name) for remark in _remarks(image)]
            except MemoryError:
                raise
            except Exception as error:  # Pillow's decoders raise errors of every kind
                raise DataError(f"{name}: broken image ({' '.join(str(error).split())})") from error
            out[i] = pixels.reshape(out.shape[1:])
        return remarks

    chunk = 512
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(work, range(i, min(i + chunk, count))) for i in range(0, count, chunk)]
        try:
            for future in futures:
                for remark, name in future.result():
                    found.setdefault(remark, []).append(name)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for remark, names in found.items():
        tell(f"{len(names)} of {count} images {remark} (the first: {names[0]})")
    return out


def _remarks(image: Image.Image) -> Iterator[str]:
    """What of a file its pixels do not show."""
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        yield "have transparency, which is dropped"
    if image.mode == "CMYK":
        yield "are CMYK, converted to RGB without a colour profile"
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        yield "are animated, of which the first frame is taken"
    with contextlib.suppress(Exception):  # of malformed EXIF, which says nothing about the pixels
        if image.getexif().get(_ORIENTATION, 1) != 1:
            yield "have an EXIF orientation, which is not applied"


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow would cut 16 bits a channel to 8 in silence."""
    tiles = getattr(image, "tile", None)
    if not tiles:  # as of WebP, which has 8
        return False
    codec, _, _, arguments = tiles[0]
    if image.format == "PNG":
        return ";16" in str(arguments)
    return codec.startswith("ppm") and isinstance(arguments, tuple) and int(arguments[1]) > 255


def _format(image: Image.Image) -> str:
    return f"{image.mode} of 16 bits" if image.mode in _MODES else image.mode


def _open(name: str, content: Any) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        kind = kind_of(bytes(content[:512]))
        raise DataError(f"{name}: not an image{f' but {kind}' if kind else ''}") from error
    except MemoryError:
        raise
    except Exception as error:  # as above; also for an image that is too large to be meant
        raise DataError(f"{name}: not an image that can be read ({' '.join(str(error).split())})") from error
