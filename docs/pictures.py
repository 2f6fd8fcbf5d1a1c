"""Draws the drawings of docs/images/: what MWPB's radius makes of a margin, with the balls of three images, and
the way of a batch through a method. Their colours are readable on light and on dark ground.

python docs/pictures.py
"""

from __future__ import annotations

import math
from pathlib import Path

ALPHA, WIDTH, HEIGHT, LEFT, BOTTOM = 0.58, 640, 260, 60, 210
IMAGES = ((-0.8, "wrong already"), (0.1, "unsure"), (0.9, "sure"))
STOPS = (
    ("natural batch", "images and labels"),
    ("budget", "a radius an image"),
    ("attack", "PGD in these balls"),
    ("objective", "loss of the weights"),
    ("perturbation", "AWP, or none"),
    ("optimiser", "the weights' step"),
)


def radius(margin: float) -> float:
    """In units of eps."""
    return math.exp(ALPHA * margin)


def svg(width: int, height: int, parts: list[str]) -> str:
    style = "font: 14px system-ui, sans-serif; fill: #888"
    lines = "\n".join(parts)
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{style}">'
    return f"{opened}\n{lines}\n</svg>\n"


def radii() -> str:
    """The curve of the radius, and the balls of three images on it."""

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
        across, down = 400, 55 + 75 * row
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#f97316"/>',
            f'<circle cx="{across}" cy="{down}" r="{18 * radius(margin):.1f}" fill="none" stroke="#f97316"/>',
            f'<circle cx="{across}" cy="{down}" r="18" fill="none" stroke="#888" stroke-dasharray="4 3"/>',
            f'<circle cx="{across}" cy="{down}" r="2" fill="#888"/>',
            f'<text x="{across + 45}" y="{down + 5}">{words}: {radius(margin):.2f} eps</text>',
        ]
    return svg(WIDTH, HEIGHT, parts)


def way() -> str:
    """The axes of a method in the order in which a batch comes to them; three in a row, for a phone's sake."""
    wide, high, gap, parts = 150, 56, 25, []
    for number, (name, words) in enumerate(STOPS):
        x, y = 3 + number % 3 * (wide + gap), 3 + number // 3 * (high + gap)
        parts += [
            f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="6" fill="none" stroke="#3b82f6"/>',
            f'<text x="{x + wide // 2}" y="{y + 24}" text-anchor="middle" font-weight="bold">{name}</text>',
            f'<text x="{x + wide // 2}" y="{y + 43}" text-anchor="middle" font-size="13">{words}</text>',
        ]
        if number == 2:  # to the next row
            path = f"M{x + wide // 2} {y + high}v{gap // 2}H{3 + wide // 2}v{gap - gap // 2 - 6}"
            tip = f"M{3 + wide // 2 - 5} {y + high + gap - 7}h10l-5 7z"
        elif number < len(STOPS) - 1:
            path = f"M{x + wide} {y + high // 2}h{gap - 6}"
            tip = f"M{x + wide + gap - 7} {y + high // 2 - 5}v10l7 -5z"
        else:
            continue
        parts.append(f'<path d="{path}" fill="none" stroke="#888"/><path d="{tip}"/>')
    return svg(3 * wide + 2 * gap + 6, 2 * high + gap + 6, parts)


PICTURES = {"radius.svg": radii, "way.svg": way}

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent / "images"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")
