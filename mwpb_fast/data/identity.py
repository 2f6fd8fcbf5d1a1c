"""Which images a state belongs to: their hash, count, shape and classes, and what differs between two sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mwpb_fast.data.dataset import DataError, Images

KIND = ("classes", "channels", "height", "width")  # what one model needs of every split that it sees


def identity(images: Images) -> dict[str, Any]:
    """What tells a split from any other, in plain types."""
    count, channels, height, width = images.images.shape
    shape = {"channels": channels, "height": height, "width": width}
    return {"sha256": images.sha256, "count": count, **shape, "classes": list(images.classes)}


def identity_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the training split that a checkpoint's state was made on; of an earlier version what it has,
    which is the classes and the channels, and of another program's file nothing."""
    own = state.get("data")
    if not isinstance(own, Mapping):
        own = {key: state[key] for key in ("classes", "channels") if key in state}
    return dict(own) if isinstance(own.get("classes"), list) else {}


def difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """How `mine` differs from `theirs`, in words, by what both have; "" where it does not."""
    keys = [key for key in mine if key in theirs and theirs[key] != mine[key]]
    parts = []
    if "classes" in keys:
        parts.append(_classes(list(theirs["classes"]), list(mine["classes"])))
    if "channels" in keys:
        parts.append(f"{theirs['channels']} channels, here {mine['channels']}")
    if {"height", "width"} & set(keys):
        parts.append(f"{theirs['width']}x{theirs['height']} pixels, here {mine['width']}x{mine['height']}")
    if "count" in keys:
        parts.append(f"{theirs['count']:,} images, here {mine['count']:,}")
    if "sha256" in keys and not parts:
        parts.append(f"other images or labels (SHA-256 {theirs['sha256'][:12]}, here {mine['sha256'][:12]})")
    return "; ".join(parts)


def require_same(folder: Path, state: Mapping[str, Any], images: Images) -> None:
    """Raises DataError unless the state of the run in `folder` was made on these images, as far as it can say."""
    if other := difference(identity_of(state), identity(images)):
        raise DataError(
            f"{folder} holds a run on other data than {images.origin} has now: {other}; take another --out, "
            "or --no-resume to begin anew"
        )


def _classes(theirs: list[str], mine: list[str]) -> str:
    if len(theirs) != len(mine):
        return f"{len(theirs)} classes, here {len(mine)}"
    number, one, other = next((i, a, b) for i, (a, b) in enumerate(zip(theirs, mine, strict=True)) if a != b)
    return f"class {number} is {one}, here {other}"
