"""How a recipe, YAML files and the command line make a configuration, and how one is saved and read again."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from mwpb_fast.config.radius import parse_radius
from mwpb_fast.config.registry import axis_config, axis_name
from mwpb_fast.config.schema import ADDED, AXES, Config, ConfigError


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration in plain types, exact: radii as fractions, axes with their names."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Fraction):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    result = plain(config)
    for field, kind in AXES.items():
        result[field] = {"name": axis_name(kind, getattr(config, field)), **result[field]}
    return result


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` wrote. Raises ConfigError for unknown keys and bad values."""
    start = blank(values)
    earlier = [{field: own} for field in AXES if (own := _earlier(getattr(start, field), values[field]))]
    return resolve(start, [*earlier, values], [])


def blank(values: Mapping[str, Any]) -> Config:
    """The recipe and the axes of what `to_dict` wrote, with the defaults of all else. Raises ConfigError."""
    missing = {f.name for f in dataclasses.fields(Config)} - ADDED - set(values)
    if missing:
        raise ConfigError(f"a saved configuration without {', '.join(sorted(missing))}")
    return Config(
        recipe=str(values["recipe"]),
        data=importlib.import_module("mwpb_fast.data.dataset").Config(),
        **{field: _axis(field, values[field]) for field in AXES},
    )


def _axis(field: str, value: Any) -> Any:
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"{field} must say which module of {AXES[field]} it means, as name: ...")
    return axis_config(AXES[field], str(value["name"]))


def _earlier(axis: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What an axis was before it had options that a saved configuration does not name."""
    return {name: value for name, value in getattr(axis, "earlier", {}).items() if name not in saved}


def resolve(start: Config, files: Iterable[Mapping[str, Any]], arguments: list[str]) -> Config:
    """`start` (a recipe's configuration) overridden by mappings (YAML files) and then by command-line arguments.

    An axis is changed by its module's name: `--objective mart`, or `objective: {name: mart, beta: 6}`; its
    other values then start from that module's defaults, keeping the radius `eps` of the axis it replaces.
    Raises ConfigError, one line, for unknown keys and bad values.
    """
    overrides: list[dict[str, Any]] = []
    for mapping in files:
        override: dict[str, Any] = {}
        for key, value in mapping.items():
            if key in AXES and isinstance(value, Mapping) and "name" in value:
                start = _swap(start, key, str(value["name"]))
                value = {k: v for k, v in value.items() if k != "name"}
            elif key in AXES and isinstance(value, str):
                start, value = _swap(start, key, value), {}
            if value != {}:
                override[key] = value
        overrides.append(override)
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        flag, equals, value = argument.partition("=")
        if flag.removeprefix("--") in AXES and flag.startswith("--"):
            if not equals and not queue:
                raise ConfigError(f"{flag} wants a name")
            start = _swap(start, flag.removeprefix("--"), value if equals else queue.pop(0))
        else:
            rest.append(argument)
    return _parse(start, overrides, rest)


def _swap(start: Config, field: str, name: str) -> Config:
    old = getattr(start, field)
    kind = AXES[field]
    new = axis_config(kind, name)
    if type(new) is type(old):
        return start
    if kind == "budgets" and new.eps is not None and old.eps is not None:
        new = dataclasses.replace(new, eps=old.eps)
    return dataclasses.replace(start, **{field: new})


def _parse(start: Config, overrides: list[dict[str, Any]], arguments: list[str]) -> Config:
    import jsonargparse
    from jsonargparse.typing import register_type

    # an axis' options inherit from `mwpb_fast.method`, and are yet not to be read as one of several classes
    jsonargparse.set_parsing_settings(subclasses_disabled=[dataclasses.is_dataclass])
    register_type(Fraction, str, parse_radius, fail_already_registered=False)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, prog="mwpb-fast", add_help=False)
    hints = {f.name: f.type for f in dataclasses.fields(Config)}
    for name in hints:
        value = getattr(start, name)
        if dataclasses.is_dataclass(value):
            _evaluate_annotations(type(value))
        parser.add_argument(f"--{name}", type=type(value), default=value)
    try:
        namespace = parser.get_defaults()
        for override in overrides:
            namespace = parser.parse_object(override, namespace=namespace)
        namespace = parser.parse_args(arguments, namespace=namespace)
        built = parser.instantiate(namespace)
        return Config(**{name: built[name] for name in hints})
    except (jsonargparse.ArgumentError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _evaluate_annotations(cls: type) -> None:
    # left as strings, jsonargparse evaluates them by running the module's TYPE_CHECKING imports: torch among them
    hints = typing.get_type_hints(cls)
    maker = next(vars(c)["__init__"] for c in cls.__mro__ if "__init__" in vars(c))  # a class may inherit it
    maker.__annotations__.update(hints)
    for field in dataclasses.fields(cls):
        field.type = hints[field.name]
