"""Draws docs/images/radius.svg: what MWPB's radius makes of a margin, and the balls of three images.

python docs/pictures.py
"""

from __future__ import annotations

import math
from pathlib import Path

ALPHA, WIDTH, HEIGHT, LEFT, BOTTOM = 0.58, 640, 260, 60, 210
IMAGES = ((-0.8, "taken for another class"), (0.1, "unsure"), (0.9, "sure"))


def radius(margin: float) -> float:
    """In units of eps."""
    return math.exp(ALPHA * margin)


def picture() -> str:
    """The SVG; its colours are readable on light and on dark ground."""

    def point(margin: float, value: float) -> tuple[float, float]:
        return LEFT + (margin + 1) * 130, BOTTOM - value * 95

    curve = " ".join("{:.1f},{:.1f}".format(*point(i / 20, radius(i / 20))) for i in range(-20, 21))
    (x0, y1), (x1, _) = point(-1, 1), point(1, 1)
    parts = [
        f'<polyline points="{curve}" fill="none" stroke="#3b82f6" stroke-width="3"/>',
        f'<path d="M{x0} 10V{BOTTOM}H{x1}M{x0} {y1}H{x1}" fill="none" stroke="#888" stroke-dasharray="4 3"/>',
        f'<text x="{x0 - 8}" y="{y1 + 5}" text-anchor="end">eps</text>',
        f'<text x="{x0}" y="{BOTTOM + 20}">-1</text>',
        f'<text x="{x1}" y="{BOTTOM + 20}" text-anchor="end">margin 1</text>',
        f'<text x="{x0 + 10}" y="28">radius exp(alpha margin) eps</text>',
    ]
    for row, (margin, words) in enumerate(IMAGES):
        x, y = point(margin, radius(margin))
        across, down = 410, 55 + 75 * row
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#f97316"/>',
            f'<circle cx="{across}" cy="{down}" r="{18 * radius(margin):.1f}" fill="none" stroke="#f97316"/>',
            f'<circle cx="{across}" cy="{down}" r="18" fill="none" stroke="#888" stroke-dasharray="4 3"/>',
            f'<circle cx="{across}" cy="{down}" r="2" fill="#888"/>',
            f'<text x="{across + 50}" y="{down + 5}">{words}: {radius(margin):.2f} eps</text>',
        ]
    style = "font: 14px system-ui, sans-serif; fill: #888"
    lines = "\n".join(parts)
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" style="{style}">'
    return f"{opened}\n{lines}\n</svg>\n"


if __name__ == "__main__":
    target = Path(__file__).resolve().parent / "images" / "radius.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(picture(), encoding="utf-8")
