"""A file's name is the registry: whatever it offers is one of its kind, and nothing else can be had from it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from mwpb_fast import cli, data, models
from mwpb_fast.config import (
    AXES,
    Config,
    ConfigError,
    axis_config,
    blank,
    load,
    names,
    recipe,
    recipes_of,
    to_dict,
)
from mwpb_fast.data import DataError, find_set, known_sets
from mwpb_fast.evaluation import catalog
from mwpb_fast.models import available, build_model, parse_name

START = "digits.mwpb_at"
KINDS = sorted(set(AXES.values()))


def private(package: ModuleType) -> list[str]:
    return [found.name for found in pkgutil.iter_modules(package.__path__) if found.name.startswith("_")]


def writable(hint: Any) -> bool:
    """Whether an option may have this type: its values can be written on the command line and in YAML."""
    if hint in (int, float, bool, str, Fraction) or typing.get_origin(hint) is Literal:
        return True
    many, inner = typing.get_origin(hint) is tuple, typing.get_args(hint)
    return len(inner) == 2 and inner[1] is (... if many else type(None)) and writable(inner[0])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in names(kind)])
def test_what_an_axis_offers_is_built(kind: str, name: str) -> None:
    settings = axis_config(kind, name)
    assert type(settings) is load(kind, name).Config
    assert dataclasses.is_dataclass(settings)
    assert settings.__doc__
    where = f"{type(settings).__module__}.Config"
    assert type(settings).__dataclass_params__.frozen, (
        f"{where} can change: write @dataclass(frozen=True, kw_only=True)"
    )
    hints = typing.get_type_hints(type(settings))
    for option in dataclasses.fields(settings):
        cure = "take int, float, bool, str, Fraction, a Literal, a tuple[T, ...] of one of them or T | None"
        assert writable(hints[option.name]), (
            f"{where}.{option.name}: {hints[option.name]} is no option's type; {cure}"
        )
    assert callable(built := settings.build()) or hasattr(built, "outer")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in names(kind)])
def test_what_an_axis_offers_stands_in_the_manual(kind: str, name: str) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "usage.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{kind.removesuffix('s')}`"))
    assert f"`{name}`" in row, f"docs/usage.md does not name {name} in its table of axes, {kind}"


def test_types_that_no_option_can_have_are_known() -> None:
    assert all(map(writable, (int, str | None, Fraction, tuple[int, ...], Literal["a"], bool)))
    assert not any(map(writable, (dict, dict[str, int], list[int], set, Any, Path, int | str, tuple[dict, ...])))


@pytest.mark.parametrize("axis", AXES)
def test_what_an_axis_does_not_offer_is_refused(axis: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = AXES[axis]
    package = __import__(f"mwpb_fast.{kind}", fromlist=[kind])
    for name in ["nope", "__init__", *private(package)]:
        assert cli.main(["train", START, f"--{axis}", name]) == 2
        said = capsys.readouterr().err
        assert re.search(rf"no {name!r} among the {kind}: {', '.join(names(kind))}(; did you mean \w+\?)?\n", said)
        with pytest.raises(ConfigError, match=name):
            blank(to_dict(recipe(START)) | {axis: {"name": name}})


@pytest.mark.parametrize("kind", [*KINDS, "models", "recipes"])
def test_what_a_folder_shares_cannot_be_loaded(kind: str) -> None:
    package = importlib.import_module(f"mwpb_fast.{kind}")
    for name in ["__init__", "__main__", *private(package)]:
        for word in (name, f"mwpb_fast.{kind}.{name}"):
            with pytest.raises(ConfigError, match=f"no '{word}' among the {kind}: {', '.join(names(kind))}"):
                load(kind, word)


@pytest.mark.parametrize("stem", names("recipes"))
def test_recipes_are_configurations(stem: str) -> None:
    offered = recipes_of(load("recipes", stem))
    assert offered
    assert all(isinstance(recipe(name), Config) for name in offered)


@pytest.mark.parametrize("name", available())
def test_models_are_built_by_their_numbers(name: str) -> None:
    build = load("models", name).build
    numbers = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(ValueError, match=f"write {'-'.join([name, *(f'<{n}>' for n in numbers)])}$"):
        build_model(name + 9 * "-1", num_classes=2)


def test_what_is_no_model_is_refused() -> None:
    for name in private(models):
        with pytest.raises(ValueError, match="unknown model"):
            parse_name(f"{name}-1")


def test_data_sets_are_read_and_other_files_refused() -> None:
    offered = known_sets()
    modules = {find_set(name).__name__.rpartition(".")[2] for name in offered}
    assert all(hasattr(find_set(name), "images") or hasattr(find_set(name), "read") for name in offered)
    for name in {found.name for found in pkgutil.iter_modules(data.__path__)} - modules:
        with pytest.raises(DataError, match=f"not a known data set; there are {', '.join(offered)}"):
            find_set(name)


def test_evaluations_attacks_are_attacks() -> None:
    offered = [*catalog.NAMED, *(f"{family}20" for family in catalog.FAMILIES)]
    assert all(callable(catalog.find_attack(name).run) for name in offered)
    with pytest.raises(ConfigError, match=f"there are {', '.join(offered)}, with"):
        catalog.find_attack("accuracy")
