"""Going on with a run: what of it is saved, and whether a state fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from mwpb_fast.config import Config, ConfigError, from_dict
from mwpb_fast.config.dependence import FREE, LATER, dependence
from mwpb_fast.optim import Average
from mwpb_fast.runs import checkpoint, trace
from mwpb_fast.runs.checkpoint import CheckpointError


@dataclass
class Position:
    """Where a run stands. epoch, batch: the next one, counted from 1 and 0. seconds, waited: of this epoch, spent
    on its batches, and thereof in waiting for them. best: record of the best epoch. trace: a row of runs/trace.py
    for each step of this epoch. rollbacks: how often a guard has sent it back."""

    trace: torch.Tensor
    epoch: int = 1
    batch: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    rollbacks: int = 0

    def within(self, seconds: float, waited: float) -> Position:
        """The same, so many seconds further into the epoch."""
        return replace(self, seconds=self.seconds + seconds, waited=self.waited + waited)

    def speed(self, images: int) -> dict[str, float]:
        """Of this epoch's batches so far, of so many images together, for its record."""
        return {
            "images_per_second": images / self.seconds,
            "seconds": self.seconds,
            "wait_share": self.waited / self.seconds,
        }

    def next_epoch(self) -> None:
        """At the start of the next one."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.seconds, self.waited = 0.0, 0.0
        self.trace = torch.zeros_like(self.trace)


class Chosen(Protocol):
    """What keeps what was chosen for a run, so that it goes on with the same."""

    def state(self) -> dict[str, Any]:
        """In plain types, by name."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take what is in a checkpoint's state; the weights are loaded."""
        ...


@dataclass
class Parts:
    """What changes in the course of a run and is saved with it, besides its position. memory: of each axis.
    engine: what the twin's layers were tuned to, and which engine was chosen."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Average | None
    memory: Mapping[str, Mapping[str, torch.Tensor]]
    engine: Chosen
    device: torch.device

    def state(self, position: Position) -> dict[str, Any]:
        """All of it, in tensors and plain types."""
        return {
            "epoch": position.epoch,
            "batch": position.batch,
            "seconds": position.seconds,
            "waited": position.waited,
            "best": position.best,
            "rollbacks": position.rollbacks,
            "trace": position.trace,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "memory": self.memory,
            **self.engine.state(),
            "averaged": 0 if self.ema is None else self.ema.steps,
            "random": checkpoint.random_state(self.device),
        }

    def load(self, path: Path, state: dict[str, Any], position: Position) -> None:
        """Go on from `state`, of the checkpoint `path`; sets `position`. Raises CheckpointError, one line, where
        it is not of this model, optimiser and number of batches."""
        if misfit := "; ".join(self._misfits(state, position)):
            raise CheckpointError(f"{path}: does not fit this run: {misfit}; --no-resume begins anew")
        try:
            self._load(state, position)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise CheckpointError(f"{path}: does not fit this run: {reason}; --no-resume begins anew") from error

    def _misfits(self, state: dict[str, Any], position: Position) -> Iterator[str]:
        saved = {f"model.{name}": value for name, value in dict(state.get("model", {})).items()}
        own = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for axis, memory in self.memory.items():
            own |= {f"memory.{axis}.{name}": value for name, value in memory.items()}
            found = state.get("memory", {}).get(axis, {})
            saved |= {f"memory.{axis}.{name}": value for name, value in found.items()}
        own["trace"], saved["trace"] = position.trace, _trace(state)
        for name, value in own.items():
            if isinstance(value, torch.Tensor):
                theirs = getattr(saved.get(name), "shape", None)
                if theirs != value.shape:
                    there = "nothing" if theirs is None else tuple(theirs)
                    yield f"{name} is {there}, not {tuple(value.shape)}"
                    return  # the first tells enough
        if self.ema is not None and not state.get("ema"):
            yield "it has no averaged weights"

    def _load(self, state: dict[str, Any], position: Position) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.steps = state["averaged"]
        for name, memory in self.memory.items():
            for key, values in memory.items():
                values.copy_(state["memory"][name][key])
        self.engine.load(state)
        position.epoch, position.batch, position.best = state["epoch"], state["batch"], state["best"]
        position.seconds, position.waited = state["seconds"], state["waited"]
        position.rollbacks = state.get("rollbacks", 0)
        position.trace = _trace(state).to(self.device)
        checkpoint.set_random_state(state["random"], self.device)  # last: what is above may draw


def _trace(state: dict[str, Any]) -> Any:
    """The trace of a saved state, as it is to be now."""
    rows = state.get("trace")
    return trace.widened(rows) if isinstance(rows, torch.Tensor) and rows.dim() == 2 else rows


def find(folder: Path, config: Config) -> tuple[str, dict[str, Any]] | None:
    """Path and state of the newest checkpoint of the run in `folder`, if there is one. Raises ConfigError where
    that run has other settings than `config`, CheckpointError where it cannot be gone on with."""
    found = checkpoint.read_newest(folder / "checkpoints", "last")
    if found is None:
        return None
    path, state = found
    if "random" not in state or "config" not in state:
        raise CheckpointError(
            f"{path}: of an earlier version, which did not save all that a run needs to go on exactly; "
            "--no-resume begins anew"
        )
    try:
        theirs = dependence(from_dict(state["config"]), FREE | LATER)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; take another --out, or --no-resume to begin anew") from error
    mine = dependence(config, FREE | LATER)
    if differing := sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key)):
        raise ConfigError(
            f"{folder} holds a run with other settings ({', '.join(differing)}); "
            "take another --out, or --no-resume to begin anew"
        )
    return str(path), state
