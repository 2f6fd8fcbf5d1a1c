"""Speeds, times and counts as people read them."""

from __future__ import annotations


def pace(rate: float, unit: str) -> str:
    """So many units a second, and seconds a unit where that is less than one: 1,234 images/s, 4.2 images/s,
    3.2 s/image; empty for none."""
    if rate <= 0:
        return ""
    if rate < 1:
        one = unit.removesuffix("es" if unit.endswith("sses") else "s")
        return f"{1 / rate:,.{int(rate > 0.1)}f} s/{one}"
    return f"{rate:,.{int(rate < 9.95)}f} {unit}/s"


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3 h 5 min, 2 d 4 h; seconds up to two minutes."""
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // part)} {smaller}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def counted(n: int, name: str) -> str:
    """Such as 1 run, 1,200 runs. name: in the singular, with a regular plural."""
    return f"{n:,} {name}{'' if n == 1 else 's'}"
