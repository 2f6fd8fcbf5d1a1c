"""Two runs on the same test images, image by image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mwpb_fast.evaluation.score import NORMAL_QUANTILE, pointwise
from mwpb_fast.report.read import Attack, Result


@dataclass(frozen=True)
class Difference:
    """points: how much higher the accuracy of the second is. interval: 95 %, over the choice of test images."""

    attack: str
    points: float
    interval: tuple[float, float]
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval[0] > 0 or self.interval[1] < 0


def paired(first: str, second: str, attack: str = "") -> Difference:
    """From two strings of flags. The interval is Agresti and Min's (2005): Wald's with half an image added to each
    of the four counts, which keeps its level where few images differ."""
    n = len(first)
    gained = sum(a < b for a, b in zip(first, second, strict=True))
    lost = sum(a > b for a, b in zip(first, second, strict=True))
    more, less, all_ = gained + 0.5, lost + 0.5, n + 2
    middle = (more - less) / all_
    half = NORMAL_QUANTILE * math.sqrt((more + less) - (more - less) ** 2 / all_) / all_
    return Difference(attack, 100 * (gained - lost) / n, (100 * (middle - half), 100 * (middle + half)), n)


def options(config: Mapping[str, Any], place: str = "") -> dict[str, str]:
    """Every value of a configuration as text, by a name such as budget.eps."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{place}{key}"
        found |= options(value, f"{name}.") if isinstance(value, Mapping) else {name: plain(value)}
    return found


def plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def attacked(result: Result) -> dict[str, str]:
    """The attacks that the worst case of a result is over, with their balls."""
    of = result.worst.of if result.worst else ()
    return {name: result.attacks[name].ball for name in of if name != "natural" and name in result.attacks}


def shared(results: Sequence[Result]) -> list[str]:
    """The attacks that are in the worst case of every result, at the same radius."""
    every = [attacked(result) for result in results]
    return [name for name, ball in every[0].items() if all(e.get(name) == ball for e in every)] if every else []


def worst_of(result: Result, names: Sequence[str]) -> Attack:
    """The point-wise worst case over some of a result's attacks."""
    flags = [result.attacks[name].flags for name in ("natural", *names) if name in result.attacks]
    found = pointwise(flags)
    low, high = found["interval"]
    return Attack(f"worst of {', '.join(names)}", found["accuracy"], (low, high), found["flags"], of=tuple(names))


def differences(first: Result | None, second: Result | None) -> list[Difference]:
    """Of all attacks that both results have on the same images, at the same radius; and of the worst case over
    these, where the two have it over others too."""
    if first is None or second is None or not first.data or first.data != second.data:
        return []
    found = []
    for name, one in first.attacks.items():
        other = second.attacks.get(name)
        if other and other.n == one.n and (other.images, other.ball) == (one.images, one.ball):
            found.append(paired(one.flags, other.flags, name))
    if first.n == second.n and attacked(first) != attacked(second) and len(both := shared([first, second])) > 1:
        one, other = worst_of(first, both), worst_of(second, both)
        found.append(paired(one.flags, other.flags, one.name))
    return found
