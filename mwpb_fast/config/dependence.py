"""What of its configuration a run depends on, and what may be another from one part of it to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from mwpb_fast.config.registry import axis_name
from mwpb_fast.config.resolve import to_dict
from mwpb_fast.config.schema import ADDED, AXES, Config, GuardConfig, KeepConfig

# Neither the weights nor the choice of the best epoch, which is made at evaluation.eps, depend on these: both
# loaders give the same batches, a captured step the eager one's bits, and what a pin said is in the checkpoint.
FREE = frozenset(
    {
        "recipe",
        "data.dir",
        "data.loader",
        "data.threads",
        "precision.device",
        "precision.capture",
        "precision.pin",
        "evaluation.attacks",
        "evaluation.step_size",
        "evaluation.batch_size",
        "evaluation.subset",
        "evaluation.costly_subset",
        "guard.hang",
        *(f"keep.{field.name}" for field in dataclasses.fields(KeepConfig)),
    }
)
# A run may go on for longer than it was meant to at first, and be validated and guarded otherwise from then on.
LATER = frozenset(
    {
        "epochs",
        "evaluation.validate_every",
        *(f"guard.{field.name}" for field in dataclasses.fields(GuardConfig)),
    }
)


def dependence(config: Config, free: Collection[str] = FREE) -> dict[str, Any]:
    """What a run depends on, in plain types: option or group -> value. free: options that are left out.

    Values that are their module's default are left out as well, so that a new option with a default that changes
    nothing leaves what earlier runs depend on alone.
    """
    plain, found = to_dict(config), {}
    for field in dataclasses.fields(Config):
        name, value = field.name, getattr(config, field.name)
        if name in free:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            default = type(value)()
            kept = {
                f.name: plain[name][f.name]
                for f in dataclasses.fields(value)
                if f"{name}.{f.name}" not in free and getattr(value, f.name) != getattr(default, f.name)
            }
            if kept or name not in ADDED:
                found[name] = [axis_name(AXES[name], value) if name in AXES else "", kept]
        elif value != field.default:
            found[name] = plain[name]
    return found
