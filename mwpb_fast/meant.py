"""Which known name somebody meant, said in the same words of options, commands, recipes, models and attacks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

SHORT = 80  # characters of a list that is worth showing although the name that was meant is found


def near(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names most like `name`, at most `count`; the one that differs in case and in -, _ and . alone,
    where there is one. Empty where nothing is near, or more than `count` are equally near."""
    by_letters: dict[str, str] = {}
    for other in known:
        by_letters.setdefault(_letters(other), other)
    own = _letters(name)
    if own in by_letters:
        return [by_letters[own]]
    close = difflib.get_close_matches(own, by_letters, n=count + 1, cutoff=0.65)
    likeness = [difflib.SequenceMatcher(None, letters, own).ratio() for letters in close]
    if len(close) > count and likeness[0] == likeness[-1]:  # of table9 nobody knows which table it is
        return []
    return [by_letters[letters] for letters in close[:count]]


def meant(name: str, known: Iterable[str], lead: str = "; there are ", count: int = 1, listed: str = "") -> str:
    """How a message ends about a name that is not among the `known`: with `; did you mean X?`, and with what there
    is, after `lead`, where nothing is near or the list is short. listed: what there is, if not the names alone."""
    known = list(known)
    there = f"{lead}{listed or ', '.join(known)}"
    if not (close := near(name, known, count)):
        return there
    return f"{there if len(there) <= SHORT else ''}; did you mean {' or '.join(close)}?"


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
