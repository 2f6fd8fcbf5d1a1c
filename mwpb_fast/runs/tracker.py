"""A run's records in trackio or wandb as well, which have one interface: init, log, finish.

metrics.jsonl stays the truth: what such a service dies of costs its own copy and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
from pathlib import Path
from typing import Any

from mwpb_fast.config import ConfigError
from mwpb_fast.system.optional import attempt

PACKAGES = ("trackio", "wandb")
EXTRAS = {"trackio": "track"}
PROJECT = "mwpb-fast"


def require(package: str) -> Any:
    """The module of a tracker. Raises ConfigError where it is missing or broken."""
    found = attempt(package)
    if found.module is None:
        raise ConfigError(f"--track {package}: it {found.why}: {found.cure(package, EXTRAS.get(package, ''))}")
    return found.module


class Tracker:
    """One run in a tracker, which a run that goes on takes up again. folder: the run's; its path is its name."""

    def __init__(self, package: str, folder: Path, config: dict[str, Any]) -> None:
        self.package, self._module = package, require(package)
        # wandb knows a run by its id, trackio by its name
        own = {"id": hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16], "dir": str(folder)}
        taken = inspect.signature(self._module.init).parameters
        more = {name: value for name, value in own.items() if name in taken}
        self._call("init", project=PROJECT, name=str(folder), config=config, resume="allow", **more)

    def log(self, record: dict[str, Any]) -> None:
        """The numbers of an epoch's record."""
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "epoch"}
        self._call("log", numbers, step=record["epoch"])

    def finish(self) -> None:
        self._call("finish")

    def _call(self, name: str, /, *words: Any, **options: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # which is for what a program may read, and not for banners
            getattr(self._module, name)(*words, **options)
