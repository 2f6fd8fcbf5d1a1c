"""Values of options as users write them, each read by the type of its option and refused by its name.

Neither Python's nor YAML's reading of text will do: `int` takes other scripts' digits, YAML 1.1 takes 010 for 8,
1:30 for 90 and `no` for false, and a null would reach code that has no use for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import types
import typing
from fractions import Fraction
from pathlib import Path
from typing import Any

from mwpb_fast.config.schema import ConfigError

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
LARGEST = 2**63 - 1


def check(key: str, hint: Any, value: Any) -> Any:
    """`value`, of a YAML file, for the option `key` of type `hint`. Raises ConfigError where it is of another
    type; types that are not known here are left to those who read them."""
    if value is None:
        if allows_null(hint):
            return None
        raise ConfigError(f"{key} has no value")
    if isinstance(value, str):
        return _text(key, hint, value)
    if isinstance(value, bool) and not _truth(hint):
        raise ConfigError(f"{key}: {str(value).lower()} is not {_kind(hint)}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{key}: {value} is too large")
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        return [check(f"{key}[{number}]", typing.get_args(hint)[0], item) for number, item in enumerate(value)]
    return value


def word(key: str, hint: Any, text: str) -> str:
    """`text`, of a command line, for the option `key` of type `hint`, as jsonargparse takes it. Raises
    ConfigError where it is of another type."""
    if not text:
        empty = "; write [] for an empty list" if typing.get_origin(hint) is tuple else ""
        raise ConfigError(f"{key} has no value{empty}")
    if typing.get_origin(hint) is tuple:
        inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        items = [item.strip().strip("\"'") for item in inside.split(",")] if inside.strip() else []
        if not all(items) or {"[", "]"} & set(inside):
            raise ConfigError(f"{key}: {text} is not a list such as [1, 2]")
        return json.dumps([_text(key, typing.get_args(hint)[0], item) for item in items])
    value = text if text == "null" and allows_null(hint) else _text(key, hint, text)
    return str(value).lower() if isinstance(value, bool) else text


def _text(key: str, hint: Any, text: str) -> Any:
    known = {int: _WHOLE, float: _NUMBER}
    inner = [kind for kind in typing.get_args(hint) if kind is not type(None)] if allows_null(hint) else [hint]
    if _truth(hint) and text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    if len(inner) == 1 and inner[0] in known:
        if not known[inner[0]].fullmatch(text):
            octal = "; write it without the leading zero" if re.fullmatch(r"[-+]?0[0-9]+", text) else ""
            raise ConfigError(f"{key}: {text} is not {_kind(hint)}{octal}")
        number = inner[0](text)
        if not math.isfinite(number) or abs(number) > LARGEST:
            raise ConfigError(f"{key}: {text} is too large")
        return number
    if _truth(hint) and text not in _words(hint):
        raise ConfigError(f"{key}: {text} is not {_kind(hint)}")
    return text


def _truth(hint: Any) -> bool:
    """Whether true and false are values of the type, alone or beside words."""
    return hint is bool or bool in typing.get_args(hint)


def _words(hint: Any) -> list[str]:
    """The words that are values of a type beside true and false."""
    return [word for kind in typing.get_args(hint) for word in typing.get_args(kind)]


def allows_null(hint: Any) -> bool:
    """Whether None is a value of the type."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint is Any or (union and type(None) in typing.get_args(hint))


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text; write it in quotes",
    Fraction: "a radius: write 8/255 or 0.031",
}


def _kind(hint: Any) -> str:
    if _truth(hint) and (words := _words(hint)):
        return f"true, false or {' or '.join(words)}"
    return _KINDS.get(hint, "a value of this option")


# types of argparse -------------------------------------------------------------------------------------------
def path(text: str) -> Path:
    """A path on the command line; `~` is the user's own folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; write a path, `.` for this folder")
    return Path(os.path.expanduser(text))


def whole(text: str) -> int:
    """A whole number on the command line."""
    if not _WHOLE.fullmatch(text) or abs(int(text)) > LARGEST:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}")
    return int(text)
