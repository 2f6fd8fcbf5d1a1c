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


def ordered(value: Any) -> Any:
    """A plain value whose repr is the same in every process: a set has another order in each."""
    if isinstance(value, (set, frozenset)):
        return sorted(repr(ordered(item)) for item in value)
    if type(value) in (list, tuple):
        return type(value)(map(ordered, value))
    if type(value) is dict:
        return {key: ordered(item) for key, item in value.items()}
    return value
