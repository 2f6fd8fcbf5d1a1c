"""An earlier result in whose place another one is about to be put: kept beside it where the new one does not say
what it said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mwpb_fast.system.files import write_atomically

SETTINGS = {
    "model_sha256": "model",
    "data_sha256": "images",
    "eps": "eps",
    "step_size": "step size",
    "norm": "norm",
    "seed": "seed",
    "batch_size": "batch size",
}


def keep_earlier(stem: Path, result: dict[str, Any]) -> str:
    """Copy `stem`.json, and its .md if it has one, to names of their own where they are of other settings than
    `result`, or have attacks that it has not. Returns a line that says so; "" where nothing is lost.

    A copy, named by its content: of several processes that end at once, each does the same.
    """
    try:
        content = Path(f"{stem}.json").read_bytes()
        others = differences(json.loads(content), result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none
        return ""
    if not others:
        return ""
    kept = stem.with_name(f"{stem.name}-{hashlib.sha256(content).hexdigest()[:8]}")
    report = Path(f"{stem}.md")
    if report.exists():
        write_atomically(Path(f"{kept}.md"), report.read_bytes())
    write_atomically(Path(f"{kept}.json"), content)
    return f"kept: {kept}.json, the result that was there; the new one differs in {', '.join(others)}"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Of what an old result is that a new one is not. A preview is of the same images as the whole set that
    follows, and two models that were made anew have nothing in their weights to be told apart by."""
    same = {"data_sha256"} if old["preview"] and not new["preview"] else set()
    same |= {"model_sha256"} if "made" in old and "made" in new else set()
    found = [title for key, title in SETTINGS.items() if key not in same and old[key] != new[key]]
    attacks = new["attacks"]
    lost = [name for name, one in old["attacks"].items() if name not in attacks or one["n"] > attacks[name]["n"]]
    return [*found, *(["attacks"] if lost else [])]
