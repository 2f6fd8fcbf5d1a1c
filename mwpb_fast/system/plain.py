"""What a value is that says all of itself."""

from __future__ import annotations

from typing import Any


def is_plain(value: Any) -> bool:
    """Whether a value says all of itself in its repr: numbers, text, and containers of them."""
    if isinstance(value, (tuple, list, set)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))
