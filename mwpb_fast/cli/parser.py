"""The words of a command: its own options, and the overrides of the configuration's values among them."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import NoReturn

from mwpb_fast.config import ConfigError
from mwpb_fast.meant import near
from mwpb_fast.options import FIELDS

_made: ContextVar[list[Parser] | None] = ContextVar("_made", default=None)  # where parsers are being collected


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with its complaints as ConfigError."""

    def __init__(self, command: str, doc: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"mwpb-fast {command}",
            description=doc,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if (made := _made.get()) is not None:
            made.append(self)

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        close = near(found[1], self._option_string_actions) if found else []
        raise ConfigError(f"{message}{f'; did you mean {close[0]}?' if close else ''} (see {self.prog} --help)")

    def parse_with_overrides(
        self, own: Sequence[argparse.Action], arguments: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """What this parser's options `own` say, and the overrides of the configuration's values."""
        names = [name for action in own for name in action.option_strings]
        words, overrides = split(arguments, [*names, "--help"])
        for word in overrides:
            name = word.removeprefix("--").partition("=")[0]
            of_configuration = name.partition(".")[0] in FIELDS
            if not of_configuration and (close := near(name, [*names, *FIELDS])) and close[0] in names:
                raise ConfigError(f"no option {name!r}; did you mean {close[0]}?")
        return self.parse_intermixed_args(words), overrides


def parser_of(command: Callable[[Sequence[str]], int]) -> Parser:
    """The parser that a command makes, which asks it for its help alone."""
    made: list[Parser] = []
    token = _made.set(made)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            command(["--help"])
    finally:
        _made.reset(token)
    return made[0]


def split(arguments: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own words (the options `own` and whatever is no option), and the overrides as
    `--name=value`. Raises ConfigError for an override without a value."""
    mine: list[str] = []
    overrides: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or name in own:
            mine.append(word)
        elif equals or (name[2:].partition(".")[0] not in FIELDS and (not queue or queue[0].startswith("--"))):
            overrides.append(word)
        elif not queue:
            raise ConfigError(f"{word} wants a value")
        else:
            overrides.append(f"{word}={queue.pop(0)}")
    return mine, overrides
