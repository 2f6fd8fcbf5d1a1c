"""How far an attack is, so that what is said of its time is near the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GRADIENT = 2  # what a pass with the gradient of the images costs, in passes forward; weights are frozen

# Called with a part of an attack that begins, what a pass of it costs, and what is left, as `Course` has them.
Begin = Callable[[str, int, float], None]


@dataclass
class Course:
    """What of an attack on some images is done, in passes of one image forward.

    left: at the beginning of the part at work, it and what follows, at most. part: its name, if the attack has
    several. each: what an image sent through the model costs in it. since: the count of images at its beginning.
    spent: before it.
    """

    left: float
    since: int = 0
    part: str = ""
    each: int = 1
    spent: float = 0.0

    def begin(self, count: int, part: str, each: int, left: float) -> None:
        """A part of the attack begins, at that count of images sent through the model."""
        self.spent += self.each * (count - self.since)
        self.part, self.each, self.left, self.since = part, each, left, count

    def share(self, count: int) -> float:
        """Of the whole, in [0, 1]."""
        now = self.each * (count - self.since)
        return (self.spent + now) / max(self.spent + max(self.left, now), 1e-9)


class Counter:
    """Tells how many images more are done, in whole ones, and the part at work."""

    def __init__(self, images: int, report: Callable[[int, str], None]) -> None:
        self.images, self.report, self.done, self.part = images, report, 0, ""

    def reach(self, share: float, part: str = "") -> None:
        """So much of the attack is done; nothing is told that was told before."""
        new = max(int(self.images * share) - self.done, 0)
        if new or part != self.part:
            self.done, self.part = self.done + new, part
            self.report(new, part)
