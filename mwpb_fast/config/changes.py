"""In what a saved configuration departs from the recipe that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mwpb_fast.config.dependence import FREE
from mwpb_fast.config.registry import recipe
from mwpb_fast.config.resolve import to_dict
from mwpb_fast.config.schema import AXES


def changed(saved: Mapping[str, Any]) -> list[str] | None:
    """Such as `epochs 1 instead of 110`, by the recipe as this version has it; None where it has no such recipe.

    saved: what `to_dict` wrote, of whatever version, or anything else that names a recipe. The seed is left out,
    and so is what changes nothing of the training.
    """
    try:
        before = _flat(to_dict(recipe(str(saved["recipe"]))))
    except Exception:  # ConfigError, or whatever a module of the user's own raises
        return None
    now = _flat(saved)
    swapped = {field for field in AXES if now.get(f"{field}.name") != before[f"{field}.name"]}
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        if name not in now or name in FREE or name == "seed" or (name in before and before[name] == now[name]):
            continue
        field, _, option = name.partition(".")
        axis = field in AXES and option == "name"
        text = f"{field if axis else name} {_told(name, now[name])}"
        if name in before and (axis or field not in swapped):
            text += f" instead of {_told(name, before[name])}"
        found.append(text)
    return found


def _flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{place}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _told(name: str, value: Any) -> str:
    if name.endswith("subset") and not value:
        return "all"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
