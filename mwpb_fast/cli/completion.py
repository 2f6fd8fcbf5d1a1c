"""The command that writes what a shell needs to complete commands, recipes, options and their values."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from mwpb_fast.cli.parser import Parser, parser_of
from mwpb_fast.config import AXES, ConfigError, all_recipes, axis_config, names, recipe
from mwpb_fast.config.option_values import path
from mwpb_fast.options import hints, values_of
from mwpb_fast.reproduce import tables
from mwpb_fast.system.optional import attempt

SHELLS = ("bash", "zsh", "tcsh")
OVERRIDING = ("train", "reproduce")  # commands that take the configuration's options as well


def completion(arguments: Sequence[str]) -> int:
    """write a script with which a shell completes mwpb-fast"""
    parser = Parser(
        "completion",
        "Write a script for a shell, which then completes commands, recipes, options and their values at Tab.",
        "bash   mwpb-fast completion bash > ~/.local/share/bash-completion/completions/mwpb-fast\n"
        "zsh    mwpb-fast completion zsh > DIR/_mwpb-fast, with DIR one of $fpath\n"
        "tcsh   mwpb-fast completion tcsh > FILE, and `source FILE` in ~/.tcshrc",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="which shell")
    given = parser.parse_args(arguments)
    found = attempt("shtab")
    if found.module is None:
        raise ConfigError(
            f"completion needs the package shtab: it {found.why}: {found.cure('shtab', 'completion')}"
        )
    print(found.module.complete(whole_parser(found.module), shell=given.shell))
    return 0


def whole_parser(shtab: Any) -> argparse.ArgumentParser:
    """All commands in one parser, each option with the values, files or folders that it takes."""
    from mwpb_fast.cli.commands import COMMANDS

    root = argparse.ArgumentParser(prog="mwpb-fast")
    root.add_argument("-V", "--version", action="store_true", help="show the version")
    root.add_argument("--debug", action="store_true", help="show tracebacks")
    each = root.add_subparsers()
    for name, (_, command) in COMMANDS.items():
        parser = parser_of(command)
        if name in OVERRIDING:
            _add_configuration(parser)
        for action in parser._actions:
            if action.metavar in ("RECIPE", "TABLE"):
                action.choices = all_recipes() if action.metavar == "RECIPE" else list(tables.TABLES)
            elif action.type is path:
                folder = action.metavar in ("DIR", "RUN")
                action.complete = shtab.DIRECTORY if folder else shtab.FILE  # type: ignore[attr-defined]
        each.add_parser(name, parents=[parser], add_help=False, help=command.__doc__)
    return root


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    """The options of the configuration, those of every module of an axis too."""
    config = recipe(all_recipes()[0])
    modules = [(axis, axis_config(kind, name)) for axis, kind in AXES.items() for name in names(kind)]
    kinds: dict[str, Any] = {}
    for made in (config, *(dataclasses.replace(config, **{axis: value}) for axis, value in modules)):
        types = hints(made)
        kinds |= {key: types[key] for key, _ in values_of(made)}
    for key in sorted(kinds.keys() - {word.removeprefix("--") for word in parser._option_string_actions}):
        values: Sequence[str] = names(AXES[key]) if key in AXES else _values(kinds[key])
        parser.add_argument(f"--{key}", choices=values or None, help="of the configuration")


def _values(kind: Any) -> list[str]:
    """The values that an option of a type may have, where they can be listed."""
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in typing.get_args(kind)] if typing.get_origin(kind) is typing.Literal else []
