"""What a run is watched for: steps that are not finite, divergence, catastrophic overfitting, steps that hang.

All of it is judged by what a run keeps anyway, the trace of the epoch's steps and the records of the epochs, so
that a run that goes on after a stop comes to the same judgement.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mwpb_fast.config import Config, GuardConfig
from mwpb_fast.runs import checkpoint, trace
from mwpb_fast.runs.log import note, read_records
from mwpb_fast.runs.writer import Writer
from mwpb_fast.system import ranks
from mwpb_fast.system.watchdog import Watchdog, write_stacks


class TrainingError(RuntimeError):
    """Training cannot go on; one line."""


class GuardError(TrainingError):
    """A guard has found something. epoch: the last at whose start all was well, as far as is known."""

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


def check_finite(rows: torch.Tensor, epoch: int, batches: int, most: int) -> list[int]:
    """The batches of an epoch's trace so far whose steps were not finite. Raises TrainingError where they are more
    than `most`, or all `batches` of the epoch."""
    bad = trace.bad_steps(rows)
    if len(bad) > most or len(bad) == batches:
        raise TrainingError(
            f"epoch {epoch}: loss or gradient not finite in {len(bad)} of {len(rows)} steps "
            f"(batches {bad[:10]} ...); the weights are those of the last good step"
        )
    return bad


def diverged(rows: torch.Tensor, epoch: int, batches: int, guard: GuardConfig) -> str:
    """What to say of a loss above guard.loss in guard.loss_steps steps on end, or in all `batches` of an epoch
    that has fewer; empty where there is nothing. rows: of the epoch's trace so far."""
    loss = trace.columns(rows).loss
    steps = min(guard.loss_steps, batches)
    if not guard.loss or len(loss) < steps:
        return ""
    whole = (loss > guard.loss).unfold(0, steps, 1).all(1).nonzero().flatten().tolist()
    if not whole:
        return ""
    last = whole[0] + steps - 1
    return (
        f"epoch {epoch}: diverged: the loss lies above {guard.loss:g} in {steps} steps on end, "
        f"up to batch {last} ({loss[last]:.4g})"
    )


def collapsed(record: dict[str, Any], earlier: Sequence[dict[str, Any]], guard: GuardConfig) -> str:
    """What to say of catastrophic overfitting (Wong et al. 2020): PGD accuracy far below its best while that under
    FGSM has risen; empty where there is none. record: of an epoch; earlier: those before it."""
    best = _best(earlier)
    if not guard.collapse or "fgsm" not in record or best is None:
        return ""
    lost, won = best["robust"] - record["robust"], record["fgsm"] - best["fgsm"]
    if lost <= guard.collapse or won <= 0:
        return ""
    return (
        f"epoch {record['epoch']}: catastrophic overfitting: on the validation images PGD-10 accuracy is "
        f"{record['robust']:.1f} %, down from {best['robust']:.1f} % in epoch {best['epoch']}, while FGSM "
        f"accuracy rose from {best['fgsm']:.1f} % to {record['fgsm']:.1f} %"
    )


def compare(state: Mapping[str, torch.Tensor], epoch: int) -> None:
    """Raises TrainingError where the processes of a run do not have the same of everything; before it is saved."""
    if wrong := ranks.different(state):
        raise TrainingError(f"epoch {epoch}: {wrong}; the checkpoints before it are whole")


class Guards:
    """What watches the run in `folder`, whose epochs have so many batches; `writer` writes its checkpoints."""

    def __init__(self, config: Config, folder: Path, writer: Writer, batches: int) -> None:
        self.config, self.folder, self.writer, self.batches = config.guard, folder, writer, batches
        self.max_bad_steps = config.max_bad_steps
        self._told: set[str] = set()

    def steps(self, rows: torch.Tensor, epoch: int) -> tuple[list[int], dict[str, str]]:
        """Look at an epoch's trace so far; the batches whose steps were bad, and what was found, for the epoch's
        record. Raises TrainingError where they are too many, GuardError where the run is to end or to go back."""
        bad = check_finite(rows, epoch, self.batches, self.max_bad_steps)
        return bad, self._act(diverged(rows, epoch, self.batches, self.config), epoch)

    def epoch(self, record: dict[str, Any]) -> dict[str, str]:
        """Look at the record of an epoch; what was found. Raises GuardError. Of several processes rank 0 looks,
        which has the records, and all act."""

        def look() -> tuple[str, int]:
            earlier = [r for r in read_records(self.folder / "metrics.jsonl") if r["epoch"] < record["epoch"]]
            best = _best(earlier)  # the state after it can be trusted
            return collapsed(record, earlier, self.config), int(best["epoch"] + 1 if best else record["epoch"])

        return self._act(*ranks.led(look))

    def _act(self, found: str, epoch: int) -> dict[str, str]:
        if not found:
            return {}
        if self.config.action != "tell":
            raise GuardError(found, epoch)
        if found not in self._told and ranks.leads():
            note(f"{found}; --guard.action stop or roll_back would not go on")
            self._told.add(found)
        return {"guard": found}

    def state_before(self, error: GuardError, rollbacks: int) -> tuple[Path, dict[str, Any]]:
        """The newest whole state from before what was found, the oldest where all are later; counts one more than
        the `rollbacks` made so far. Raises GuardError where the run is to end."""
        if self.config.action != "roll_back":
            raise error
        if rollbacks >= self.config.rollbacks:
            raise GuardError(f"{error}; the run has gone back {rollbacks} times", error.epoch)
        found = ranks.led(lambda: self._newest_before(error))
        if found is None:
            raise GuardError(f"{error}; there is no state before it to go back to", error.epoch)
        path, state = Path(found[0]), found[1]
        if ranks.leads():
            rate = self.config.rate ** (rollbacks + 1)
            note(f"{error}; going back to {path.name}, with the learning rate times {rate:g}")
        return path, state | {"rollbacks": rollbacks + 1}

    def _newest_before(self, error: GuardError) -> tuple[str, dict[str, Any]] | None:
        self.writer.wait()
        found: tuple[str, dict[str, Any]] | None = None
        for path in checkpoint.existing(self.writer.folder, "last"):
            try:
                found = str(path), checkpoint.read(path)
            except checkpoint.CheckpointError as damage:
                note(str(damage))
                continue
            if (found[1]["epoch"], found[1]["batch"]) <= (error.epoch, 0):
                break
        return found

    def watchdog(self, where: Callable[[], str]) -> Watchdog:
        """Ends the process with 1 and a line that names the place where a step hangs, once the checkpoint that is
        being written is whole. where: what the run is doing. Of several processes each tells of itself, since
        those that wait for the one that hangs hang as well."""
        stacks = self.folder / ("hang.txt" if ranks.leads() else f"hang-{ranks.number()}.txt")

        def hung() -> None:
            place = write_stacks(stacks)
            self.writer.settle(60.0)
            newest = next(iter(checkpoint.existing(self.writer.folder, "last")), None)
            then = f"goes on from {newest.name}" if newest else "begins anew, as there is no checkpoint yet"
            if not (newest or ranks.leads()):  # its folder may be on another machine
                then = "goes on from the last checkpoint, if there is one"
            note(
                f"error: {where()}: nothing has come to its end for {self.config.hang:g} s (guard.hang), at "
                f"{place}; all stacks stand above and in {stacks}; the same command {then}"
            )
            os._exit(1)  # a thread that hangs cannot be ended in any other way

        return Watchdog(self.config.hang, hung)


def _best(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    numbers = [r for r in records if all(_is_number(r.get(name)) for name in ("robust", "fgsm"))]
    return max(numbers, key=lambda r: (float(r["robust"]), r["epoch"]), default=None)  # the later of equals


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
