"""Bringing images of mixed sizes to one size: resized by Pillow, then cropped at the centre."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwpb_fast.data.dataset import DataError

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # width, height

FILTER = "BICUBIC"
MOST = 4096  # pixels along a side


@dataclass(frozen=True)
class Fit:
    """resize: (n,) makes the shorter side n and keeps the proportions, (width, height) does not keep them, ()
    leaves the image. crop: the (width, height) at the centre that is kept, or None."""

    resize: tuple[int, ...] = ()
    crop: Size | None = None

    def __bool__(self) -> bool:
        return bool(self.resize or self.crop)

    def size(self, name: str, size: Size) -> Size:
        """What becomes of an image of this size. Raises DataError, naming the file, where it is too small."""
        size = self._resized(size)
        if self.crop and (self.crop[0] > size[0] or self.crop[1] > size[1]):
            raise DataError(
                f"{name}: is {by(size)}, too small for a crop of {by(self.crop)}; --resize {min(self.crop)} first"
            )
        return self.crop or size

    def apply(self, image: Image.Image) -> Image.Image:
        """The image, in a mode of 8 bits a channel, brought to its size."""
        from PIL import Image

        wanted = self._resized(image.size)
        if wanted != image.size:
            image = image.resize(wanted, Image.Resampling[FILTER])
        if self.crop:
            left, top = (wanted[0] - self.crop[0]) // 2, (wanted[1] - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[0], top + self.crop[1]))
        return image

    def record(self) -> dict[str, Any]:
        """What was done, for the set's description."""
        import PIL

        how = {"filter": f"Pillow {PIL.__version__} {FILTER}, antialiased"} if self.resize else {}
        return {"resize": list(self.resize), **how, "crop": list(self.crop or ())}

    def _resized(self, size: Size) -> Size:
        if len(self.resize) == 2:
            return self.resize[0], self.resize[1]
        if not self.resize:
            return size
        share = self.resize[0] / min(size)
        return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def make_fit(resize: str | None, crop: str | None) -> Fit:
    """From what --resize and --crop say, each 64 or 64x48 or None. Raises DataError."""
    kept = _parse("--crop", crop)
    return Fit(_parse("--resize", resize), (kept[0], kept[-1]) if kept else None)


def _parse(option: str, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    found = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    numbers = tuple(int(part) for part in found.groups() if part) if found else ()
    if not numbers or not all(1 <= number <= MOST for number in numbers):
        raise DataError(f"{option}: {text} is no size; write 64 or WIDTHxHEIGHT as in 64x48, each 1 to {MOST}")
    return numbers


def by(size: Size) -> str:
    """A size in messages."""
    return f"{size[0]}x{size[1]}"
