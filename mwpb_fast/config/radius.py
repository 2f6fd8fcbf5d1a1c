"""Radii as users write them: 8/255 stays 8/255, exactly, in recipes, checkpoints and results."""

from __future__ import annotations

import re
from fractions import Fraction

_EXPONENT = re.compile(r"[eE][-+]?0*[1-9][0-9_]{3}")


def parse_radius(text: str | float | int | Fraction) -> Fraction:
    """`8/255`, `0.031`, a number or a Fraction as an exact Fraction in the units of images in [0, 1].

    Raises ValueError for anything else, for a negative radius and for one above 1000.
    """
    plain = str(text).isascii() and not isinstance(text, bool)
    if not plain or _EXPONENT.search(str(text)):  # 1e-999999999 is a number with so many digits
        raise ValueError(f"{text!r} is not a radius: write 8/255 or 0.031")
    try:
        value = Fraction(str(text)) if isinstance(text, float) else Fraction(text)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} is not a radius: write 8/255 or 0.031") from error
    if not 0 <= value <= 1000:
        raise ValueError(f"{text} is not a radius: it must lie in [0, 1000]; 8/255 means eight grey levels")
    return value


def check_linf(name: str, value: Fraction) -> None:
    """Raises ValueError, which calls it `name`, for a linf radius or step beyond 1, the whole range of a pixel."""
    if value > 1:
        value = Fraction(value)
        meant = f"{value}/255" if value.denominator == 1 and value <= 255 else "8/255"
        raise ValueError(f"{name} is {value}, but images lie in [0, 1]: did you mean {meant}?")
