"""From the words of a command line to a checked configuration, with errors that say what to write instead.

A recipe's values are overridden by YAML files and then by options named after the configuration's fields:
`--objective mart` changes an axis, `--budget.eps 8/255` a value. Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from mwpb_fast import data
from mwpb_fast.config import (
    AXES,
    Config,
    ConfigError,
    EvaluationConfig,
    all_recipes,
    axis_name,
    blank,
    check_axes,
    load,
    names,
    recipe,
    resolve,
    yaml_file,
)
from mwpb_fast.config.option_values import check
from mwpb_fast.config.option_values import word as read_word
from mwpb_fast.config.registry import no_such
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.meant import meant, near
from mwpb_fast.models import parse_name

FIELDS = [field.name for field in dataclasses.fields(Config) if field.name != "recipe"]
NAME = r"[\w-]+(\.[\w-]+)*"
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a list such as [1, 2]",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, naming the file, where there is none."""
    content = yaml_file.read(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no options; write lines such as `epochs: 10`")
    return content


def read_config(path: Path) -> Config:
    """The configuration in a run's config.yaml, which somebody may have edited. Raises ConfigError, one line that
    names the file."""
    content = read_yaml(path)
    try:
        return _override(blank(content), content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def configure(name: str, files: Mapping[Path, dict[str, Any]], overrides: Sequence[str]) -> Config:
    """The recipe's configuration with the files' and then the command line's overrides, checked.

    Raises ConfigError or DataError, one line, also for a model or data set that there is not.
    """
    config = find_recipe(name)
    for path, content in files.items():
        try:
            config = _override(config, content)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    # axes first, so that the options of the new ones are known to the messages about the rest
    axes = [word for word in overrides if word.removeprefix("--").partition("=")[0] in AXES]
    rest = [word for word in overrides if word not in axes]
    for word in axes:
        field, _, value = word.removeprefix("--").partition("=")
        _check_axis(field, value)
    config = _resolve(config, {}, axes)
    config = _resolve(config, {}, [_checked(config, word) for word in rest])
    _check_names(config)
    home = os.path.expanduser(config.data.dir)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dir=home))


def _override(config: Config, content: Mapping[str, Any]) -> Config:
    """`config` with what a YAML file says: the axes first, so that the rest is judged by the new modules."""
    values = {key: value for key, value in content.items() if key != "recipe"}
    _check_shape(config, values)
    axes: dict[str, str] = {}
    rest: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = dict(value)
            if key in AXES and "name" in value:
                axes[key] = str(value.pop("name"))
            if not value:
                continue
        elif key in AXES:
            axes[key] = value
            continue
        rest[key] = value
    config = _resolve(config, axes, [])
    types = hints(config)
    for key, value in rest.items():
        if isinstance(value, dict):
            named = {k: f"{key}.{k}" for k in value}
            rest[key] = {k: check(named[k], types.get(named[k], Any), v) for k, v in value.items()}
        else:
            rest[key] = check(key, types.get(key, Any), value)
    config = _resolve(config, rest, [])
    _check_finite(config)  # a YAML file can say .nan; the command line cannot
    return config


def _resolve(config: Config, values: dict[str, Any], words: list[str]) -> Config:
    if not values and not words:
        return config
    try:
        return resolve(config, [values], words)
    except ConfigError as error:
        raise ConfigError(explain(str(error), config)) from error


def find_recipe(name: str) -> Config:
    """The configuration of a recipe, with a suggestion where there is none of that name."""
    if not re.fullmatch(NAME, name) or any(part.startswith("_") for part in name.split(".")):
        raise ConfigError(f"{name!r} is not a recipe's name, such as table1.mwpb_at (all: mwpb-fast recipes)")
    try:
        return recipe(name)
    except ConfigError as error:
        close = near(name, all_recipes(), 3)
        if "." not in name or not close:
            raise ConfigError(f"{error} (all: mwpb-fast recipes)") from error
        raise ConfigError(f"no recipe {name!r}; did you mean {' or '.join(close)}?") from error


def values_of(config: Config) -> Iterator[tuple[str, Any]]:
    """Name and value of every option, as `budget.eps` and 8/255; an axis itself as its module's name."""
    for field in FIELDS:
        value = getattr(config, field)
        if field in AXES:
            yield field, axis_name(AXES[field], value)
        if not dataclasses.is_dataclass(value):
            yield field, value
            continue
        for inner in dataclasses.fields(value):
            yield f"{field}.{inner.name}", getattr(value, inner.name)


def hints(config: Config) -> dict[str, Any]:
    """The type of every option, by its name as in `values_of`."""
    found: dict[str, Any] = typing.get_type_hints(Config)
    for field in FIELDS:
        group = type(getattr(config, field))
        if dataclasses.is_dataclass(group):
            found |= {f"{field}.{name}": hint for name, hint in typing.get_type_hints(group).items()}
    return found


def listing(config: Config) -> str:
    """The options of a configuration with their values, and what each group says of itself."""
    shown = [(key, f"  --{key} {show(value)}") for key, value in values_of(config)]
    lines = [f"options and their values in {config.recipe}:", *_documentation(Config)]
    lines += [line for key, line in shown if key in FIELDS and key not in AXES]
    for field in FIELDS:
        value = getattr(config, field)
        if not dataclasses.is_dataclass(value):
            continue
        title = f"  {field}"
        if field in AXES:
            title = f"  --{field} {axis_name(AXES[field], value)}    one of: {', '.join(names(AXES[field]))}"
        lines += ["", title]
        lines += _documentation(type(value))
        lines += [line for key, line in shown if key.startswith(f"{field}.")]
    return "\n".join(lines)


def explain(message: str, config: Config) -> str:
    """jsonargparse's message in the user's terms; one that is not recognised stays as it is."""
    unknown = re.match(r"unrecognized arguments: --([\w.]+)", message)
    unknown = unknown or re.match(r"Option '([^']+)' is not accepted", message)
    grouped = re.match(r"Group '([^']+)' does not accept option '([^']+)'", message)
    if unknown or grouped:
        return _unknown(unknown[1] if unknown else f"{grouped[1]}.{grouped[2]}", config)  # type: ignore[index]
    found = re.match(r'Parser key "([^"]+)": (.*)', message)
    if not found:
        return message
    key, reason = found[1], found[2]
    if typed := re.match(r"Expected a <class '(\w+)'>. Got value: (.*)", reason):
        reason = f"{typed[2]} is not {_KINDS.get(typed[1], typed[1])}"
    elif choice := re.match(r"Expected a typing.Literal\[(.*)\]. Got value: (.*)", reason):
        reason = f"{choice[2]} is not one of {choice[1]}".replace("'", "")
    elif group := re.match(r"Unable to load config '(.*)' - ", reason):
        reason = f"{group[1]} is not a group of options"
    elif union := re.search(r"Union subtypes.*Given value: (.*)", reason):
        reason = f"{union[1]} is not a value of this option"
    return f"{key}: {reason.removeprefix('Not of type Fraction: ')}"


def _unknown(name: str, config: Config) -> str:
    known = [key for key, _ in values_of(config)]
    like = [key for key in known if ("." in key) == ("." in name)]
    group = name.partition(".")[0]
    if group not in FIELDS or near(name, like):
        return f"no option {name!r}{meant(name, like, listed=', '.join(FIELDS))}"
    mine = [key for key in known if key.startswith(f"{group}.")]
    title = f"{group} {axis_name(AXES[group], getattr(config, group))}" if group in AXES else group
    return f"no option {name!r}; {title} has {', '.join(mine) or 'no options'}"


def check_attacks(config: EvaluationConfig | None) -> None:
    """Refuse an attack that there is not."""
    for name in config.attacks if config else ():
        find_attack(name)


def check_needs(config: Config) -> None:
    """Refuse what would end the evaluation of a run that is yet to be trained: an attack whose package is not
    installed or that needs more classes than there are, and a test split that is not there."""
    if not config.evaluation.attacks:
        raise ConfigError("evaluation.attacks is empty: there would be nothing to evaluate; or take --no-evaluate")
    classes = data.load_split(config.data, "test").num_classes
    for name in config.evaluation.attacks:
        find_attack(name).needs(classes)


def _check_shape(config: Config, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        inner = list(value.items()) if isinstance(value, Mapping) else []
        if value is None or (key in AXES and ("name", None) in inner):
            raise ConfigError(f"{key}{'.name' if inner else ''} has no value")
        if dataclasses.is_dataclass(getattr(config, str(key), None)) and not isinstance(value, (Mapping, str)):
            raise ConfigError(f"{key}: {value} is not a group of options")
        axis = value.get("name") if isinstance(value, Mapping) else value
        if key in AXES and axis is not None:
            _check_axis(key, str(axis))


def _check_finite(config: Config) -> None:
    for key, value in values_of(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}: {value} is not a finite number")


def _check_names(config: Config) -> None:
    try:
        parse_name(config.model.name)
    except ValueError as error:
        raise ConfigError(f"model.name: {error}") from error
    data.find_set(config.data.name)
    check_axes(config)
    check_attacks(config.evaluation)


def _checked(config: Config, word: str) -> str:
    """The override, refused unless it names an option in full and its value is of that type."""
    key, _, value = word.removeprefix("--").partition("=")
    known = dict(values_of(config))
    if key not in known and key not in FIELDS:
        raise ConfigError(_unknown(key, config))
    if key in FIELDS and dataclasses.is_dataclass(getattr(config, key)):
        raise ConfigError(f"{key}: {value} is not a group of options; write --{key}.NAME VALUE for one of them")
    return f"--{key}={read_word(key, hints(config)[key], value)}"


def _check_axis(field: str, name: str) -> None:
    kind = AXES[field]
    outside = "." in name and re.fullmatch(NAME, name) and hasattr(load(kind, name), "Config")
    if not outside and name not in names(kind):
        raise ConfigError(no_such(kind, name))


def _documentation(group: type) -> list[str]:
    return [f"    {line}".rstrip() for line in inspect.cleandoc(group.__doc__ or "").splitlines()]


def show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, Fraction) and 255 % value.denominator == 0:
        return f"{value * 255}/255"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
