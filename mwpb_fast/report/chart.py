"""Charts as inline SVG: marks on two axes, in the colours of the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mwpb_fast.report.markup import Markup, element, join

WIDTH, HEIGHT = 420, 250  # in units of the SVG: about the pixels of a phone, so that text is as large there
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 36
LETTERS, SLANT, LETTER = 11, 50, 7.5  # of a name below: how many at most, at which angle, how wide each is at most
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """label: what is shown along it. low, high: its ends. whole: it has whole numbers only."""

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at low, 1 at high."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = (math.log10(max(v, 1e-12)) for v in (low, high, value))
        return (value - low) / ((high - low) or 1.0)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers between its ends."""
        if self.log:
            low, high = (math.log10(max(v, 1e-12)) for v in (self.low, self.high))
            return [10.0**power for power in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
        rough = (self.high - self.low) / about
        unit = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
        step = next((m * unit for m in (1, 2, 5) if m * unit >= rough), 10 * unit)
        step = max(1, round(step)) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def span(values: Iterable[float], label: str, *, zero: bool = False, log: bool = False) -> Axis:
    """An axis that holds the values with some room; zero: from 0 on."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if log:
        return Axis(label, 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9), log=True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(label, 0.0 if zero else low - room, high + room)


def epochs(first: int, last: int) -> Axis:
    return Axis("epoch", first - 0.5, last + 0.5, whole=True)


def number(value: float) -> str:
    """Short, for a tick or a mark."""
    if 0 < abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def shortened(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}\u2026"


def below_slanted(names: Iterable[str]) -> int:
    """The room that slanted names take below a chart: none of them is cut off."""
    longest = LETTER * max(len(shortened(name)) for name in names)
    return BOTTOM + math.ceil(longest * math.sin(math.radians(SLANT))) - 15


class Chart:
    """Marks are drawn in the order of the calls. css: a class of the page's style, which has the colour. labelled:
    whether there are numbers along the x axis. bottom: room below the axis, by which the whole is higher."""

    def __init__(self, title: str, x: Axis, y: Axis, labelled: bool = True, bottom: int = BOTTOM) -> None:
        self.title, self.x, self.y, self.labelled = title, x, y, labelled
        self.bottom, self.height = bottom, HEIGHT + bottom - BOTTOM
        self._marks: list[Markup] = []
        self._behind: list[Markup] = []
        self._legend: list[Markup] = []
        self._told: list[str] = []

    def left(self, value: float) -> float:
        return LEFT + self.x.share(value) * (WIDTH - LEFT - RIGHT)

    def top(self, value: float) -> float:
        return self.height - self.bottom - self.y.share(value) * (self.height - TOP - self.bottom)

    def line(self, points: Sequence[Point], css: str, *, dashed: bool = False, steps: bool = False) -> None:
        """steps: each value holds around its x, as those of an epoch do."""
        points = [p for p in points if all(map(math.isfinite, p))]
        if steps:
            points = [(x + side, y) for x, y in points for side in (-0.5, 0.5)]
        if not points:
            return
        way = "L".join(f"{self.left(x):.1f} {self.top(y):.1f}" for x, y in points)
        self._marks.append(
            element("path", d=f"M{way}", class_=f"line {css}", stroke_dasharray="5 4" if dashed else None)
        )
        if len(points) <= 40 and not steps:
            self.dots(points, css, 2.2)

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], css: str) -> None:
        """What lies between two lines in steps."""
        ups = [(x + side, y) for x, y in zip(xs, high, strict=True) for side in (-0.5, 0.5)]
        downs = [(x + side, y) for x, y in zip(xs, low, strict=True) for side in (-0.5, 0.5)][::-1]
        way = "L".join(f"{self.left(x):.1f} {self.top(y):.1f}" for x, y in ups + downs)
        self._marks.append(element("path", d=f"M{way}Z", class_=f"fill {css}", opacity=0.18))

    def bar(self, x: Point, y: Point, css: str, opacity: float = 1.0, least: float = 0.0, told: str = "") -> None:
        """A rectangle from x[0] to x[1] and y[0] to y[1], at least so high; told: what it says when pointed at."""
        left, right = sorted(map(self.left, x))
        top, foot = sorted(map(self.top, y))
        if (lack := least - (foot - top)) > 0:
            top, foot = top - lack / 2, foot + lack / 2
        self._marks.append(
            element("rect", *([element("title", told)] if told else []), x=f"{left:.1f}", y=f"{top:.1f}",
                    width=f"{max(right - left, 0):.1f}", height=f"{foot - top:.1f}", class_=f"fill {css}",
                    opacity=f"{opacity:.2f}" if opacity < 1 else None)
        )  # fmt: skip

    def dots(self, points: Iterable[Point], css: str, radius: float = 2.5, opacity: float = 1.0) -> None:
        for x, y in points:
            self._marks.append(
                element("circle", cx=f"{self.left(x):.1f}", cy=f"{self.top(y):.1f}", r=radius,
                        class_=f"fill {css}", opacity=f"{opacity:.2f}" if opacity < 1 else None)
            )  # fmt: skip

    def shade(self, low: float, high: float, name: str) -> None:
        """Part of the width behind everything, with its name where that fits."""
        left, right = self.left(max(low, self.x.low)), self.left(min(high, self.x.high))
        self._behind.append(
            element("rect", x=f"{left:.1f}", y=TOP, width=f"{max(right - left, 0):.1f}",
                    height=self.height - TOP - self.bottom, class_="shade")
        )  # fmt: skip
        if right - left > 60:
            self._behind.append(element("text", name, x=f"{left + 6:.1f}", y=self.height - self.bottom - 7))

    def upright(self, x: float, name: str, css: str = "ink") -> None:
        """A line across the chart at x, with its name."""
        if self.x.low <= x <= self.x.high:
            at = self.left(x)
            near_end = at > WIDTH - 90
            self._marks.append(
                element("path", d=f"M{at:.1f} {TOP}V{self.height - self.bottom}", class_=f"rule {css}")
            )
            self._marks.append(
                element("text", name, x=f"{at + (-4 if near_end else 4):.1f}", y=TOP + 9, class_="mark",
                        text_anchor="end" if near_end else None)
            )  # fmt: skip

    def below(self, x: float, name: str, slanted: bool) -> None:
        """A name under the chart."""
        short = shortened(name)
        at, foot = f"{self.left(x):.1f}", self.height - self.bottom + (11 if slanted else 15)
        turn = (
            {"text_anchor": "end", "transform": f"rotate({-SLANT} {at} {foot})"}
            if slanted
            else {"text_anchor": "middle"}
        )
        self._marks.append(element("text", short, x=at, y=foot, **turn))

    def level(self, y: float, name: str) -> None:
        """A line along the chart at y, with its name."""
        if self.y.low <= y <= self.y.high:
            at = self.top(y)
            self._marks.append(element("path", d=f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}", class_="rule ink"))
            self._marks.append(element("text", name, x=LEFT + 4, y=f"{at - 3:.1f}", class_="mark"))

    def legend(self, css: str, name: str, *, dashed: bool = False, dot: bool = False) -> None:
        mark = (
            element("circle", cx=11, cy=5, r=4, class_=f"fill {css}")
            if dot
            else element("path", d="M1 5H21", class_=f"line {css}", stroke_dasharray="5 4" if dashed else None)
        )
        sample = element("svg", mark, viewBox="0 0 22 10", width=22, height=10, aria_hidden="true")
        self._legend.append(element("span", sample, " ", name))

    def tell(self, sentence: str) -> None:
        """What stands below the chart."""
        self._told.append(sentence)

    def figure(self) -> Markup:
        """The chart with its title, its legend and what it tells."""
        foot, right = self.height - self.bottom, WIDTH - RIGHT
        marks: list[Markup] = []
        for tick in self.y.ticks():
            at = f"{self.top(tick):.1f}"
            marks.append(element("path", d=f"M{LEFT} {at}H{right}", class_="grid"))
            marks.append(element("text", number(tick), x=LEFT - 6, y=at, dy="0.33em", text_anchor="end"))
        for tick in self.x.ticks(6) if self.labelled else ():
            marks.append(
                element("text", number(tick), x=f"{self.left(tick):.1f}", y=foot + 15, text_anchor="middle")
            )
        if self.x.label:
            marks.append(element("text", self.x.label, x=right, y=foot + 31, text_anchor="end", class_="name"))
        drawn = join(self._behind, marks, element("path", d=f"M{LEFT} {foot}H{right}", class_="axis"), self._marks)
        told = " ".join([self.title, f"({self.y.label}, by {self.x.label}).", *self._told])
        svg = element("svg", drawn, viewBox=f"0 0 {WIDTH} {self.height}", role="img", aria_label=told)
        caption = element("figcaption", element("b", self.title), element("span", self.y.label, class_="unit"))
        legend = element("p", self._legend, class_="legend") if self._legend else None
        said = element("p", " ".join(self._told), class_="told") if self._told else None
        return element("figure", caption, legend, svg, said)
