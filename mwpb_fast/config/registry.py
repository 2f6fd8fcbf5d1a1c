"""The file name is the registry: axes' modules and recipes, found by their names."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import Any

from mwpb_fast.config.schema import Config, ConfigError
from mwpb_fast.meant import meant
from mwpb_fast.method import CONFIGS, lacking


def names(kind: str) -> list[str]:
    """The modules of mwpb_fast.<kind>, sorted."""
    package = importlib.import_module(f"mwpb_fast.{kind}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """The module `mwpb_fast.<kind>.<name>`, or the one that a dotted `name` gives.

    Raises ConfigError, naming what there is, where it does not exist, or where an underscore before its own name
    says that it is there for the others of its folder.
    """
    path = name if "." in name else f"mwpb_fast.{kind}.{name}"
    try:
        found = not path.rpartition(".")[2].startswith("_") and importlib.util.find_spec(path) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        raise ConfigError(no_such(kind, name))
    return importlib.import_module(path)


def no_such(kind: str, name: str) -> str:
    """What to say of a name that is no module of mwpb_fast.<kind>."""
    return f"no {name!r} among the {kind}{meant(name, names(kind), ': ')}"


def axis_config(kind: str, name: str) -> Any:
    """The default `Config` of an axis module. Raises ConfigError where it has none, or one that lacks a part."""
    module = load(kind, name)
    if not hasattr(module, "Config"):
        raise ConfigError(f"{name!r} is a module of {kind}, but not one of the {kind}: it has no Config")
    try:
        config = module.Config()
    except TypeError as error:  # an option without a default, or an abstract method that was left out
        raise ConfigError(f"{name}: {error}") from error
    if lack := lacking(config, CONFIGS[kind]):
        raise ConfigError(lack)
    return config


def recipe(name: str) -> Config:
    """The configuration that the recipe `module.function` returns, such as table1.mwpb_at; table1.mwpb-at is the
    same one, and is called table1.mwpb_at in it."""
    name = name.replace("-", "_")
    module_name, _, function = name.rpartition(".")
    module = load("recipes", module_name or name)
    make = module.__dict__.get(function) if module_name else None
    if not callable(make) or function.startswith("_") or getattr(make, "__module__", "") != module.__name__:
        raise ConfigError(f"no recipe {name!r}; {module_name or name} has {', '.join(recipes_of(module))}")
    return dataclasses.replace(make(), recipe=name)


def recipes_of(module: ModuleType) -> list[str]:
    """Names `module.function` of a module's recipes."""
    stem = module.__name__.rsplit(".", 1)[-1]
    return [
        f"{stem}.{name}"
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def all_recipes() -> list[str]:
    """Names of every recipe of this package."""
    return [name for stem in names("recipes") for name in recipes_of(load("recipes", stem))]


def axis_name(kind: str, value: Any) -> str:
    """The name under which `load(kind, name)` finds the module of the axis configuration `value`."""
    module = type(value).__module__
    return module.removeprefix(f"mwpb_fast.{kind}.")
