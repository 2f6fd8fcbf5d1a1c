"""What a run's steps go through, looked at again from time to time; where it fails, the next best goes on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mwpb_fast import capture
from mwpb_fast.choice import looks, pass_ledger
from mwpb_fast.choice.candidates import ATTACK, DTYPES, GRAPH, TRAINING, Candidate, instead_of, preferred
from mwpb_fast.choice.ledger import Ledger
from mwpb_fast.choice.record import Record, read_pin, read_record
from mwpb_fast.choice.trial import Inputs, reason, release
from mwpb_fast.config import Config, ConfigError
from mwpb_fast.data import ResidentLoader
from mwpb_fast.data.dataset import Loader
from mwpb_fast.engine.build import PLAIN_PASS, TRAININGS, build_net, named_training
from mwpb_fast.engine.fold import UnfoldableError
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import check_dtype, full_float32
from mwpb_fast.engine.tune import take
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Method, Net
from mwpb_fast.runs.log import note
from mwpb_fast.step import Step, StepResult
from mwpb_fast.system import ranks
from mwpb_fast.system.files import to_json, write_atomically

EVERY = 5  # epochs between two looks at the sign share


class Engine:
    """net and captured step of a run, and the record of why they are these.

    model: as it is trained, not compiled. step: over it, with the net that `make_engine` made. layers: what was
    measured for that. sample: (B, C, H, W) training images, as many as a batch has. images: that are trained on.
    Raises ConfigError where a capture that was asked for cannot be, or what is pinned cannot be had.
    """

    def __init__(
        self,
        config: Config,
        model: torch.nn.Module,
        step: Step,
        method: Method,
        loader: Loader,
        sample: torch.Tensor,
        images: int,
        layers: list[dict[str, Any]],
        folder: Path,
    ) -> None:
        self.config, self.model, self.step, self.method = config, model, step, method
        self.loader, self.sample, self.images, self.folder = loader, sample, images, folder
        self.precision = step.precision.attack
        self._modes = contextlib.ExitStack()
        chosen = preferred(config, self.precision)
        how, why = ("rule", "by rule: nothing was tried") if self.judged else ("option", "as the options say")
        if chosen.net != "eager" and type(step.net) is EagerNet:
            why = f"{chosen.net} cannot be made of the model"
            chosen = Candidate("eager", chosen.dtype, chosen.captured, training=chosen.training)
        self.record = self._ruled = Record(chosen, how, why, layers=layers)
        self._trained = {PLAIN_PASS: step.model}
        try:
            self.step.trained = self.trained(chosen.training)
        except UnfoldableError as error:
            raise ConfigError(f"precision.training: {chosen.training}: {error}; take plain") from error
        self.captured = self.capture() if chosen.captured else None
        self._proved: Method | None = None
        if (pin := config.precision.pin) != "none":
            try:
                self.follow(read_pin(Path(pin).expanduser()), "pin", f"as {pin} says")
            except ConfigError as error:
                raise ConfigError(f"precision.pin: {error}") from error

    def follow(self, record: Record, how: str, why: str) -> None:
        """Take what a record says. Raises ConfigError where that cannot be."""
        record = self._as_named(record)
        try:
            self.take(record.chosen, record.layers)
        except Exception as error:
            raise ConfigError(f"{record.chosen}: {reason(error)}") from error
        tried = [dataclasses.replace(t) for t in record.tried]
        self.record = dataclasses.replace(
            record, how=how, why=why, fallbacks=[], tried=tried, layers=self.record.layers
        )

    def _as_named(self, record: Record) -> Record:
        """With the training pass that the options name, if they do."""
        training = named_training(self.config) or record.chosen.training
        return dataclasses.replace(record, chosen=dataclasses.replace(record.chosen, training=training))

    # a run that goes on ------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in plain types."""
        kept = self.record.proven or self.record.fallbacks
        return {"choices": self.record.layers, "engine": self.record.plain() if kept else {}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what a checkpoint has kept; nothing is measured."""
        layers = state.get("choices", [])
        if not state.get("engine"):
            if self.record is not self._ruled:  # a pin is for runs that are begun with it
                self.record = self._ruled
                self.take(self.record.chosen, layers)
            self.record.layers = layers
            if layers and isinstance(self.step.net, TwinNet):
                take(self.step.net, layers)
            return
        record, before = self._as_named(read_record(state["engine"])), self.record
        wrong, own = self._taken(record.chosen, layers)
        if not wrong:
            self.record = record
            return
        note(f"engine: {record.chosen} fails here ({wrong}); {before.chosen} goes on")  # on another machine
        if not own:
            self.take(before.chosen, before.layers)

    def _taken(self, candidate: Candidate, layers: list[dict[str, Any]]) -> tuple[str, str]:
        """`take`, on every rank or none: why one of them could not, and why this one could not; "" where it
        could."""
        own = ""
        try:
            self.take(candidate, layers)
        except Exception as error:
            own = reason(error)
        return ranks.agreed(own), own

    def share(self, wrong: str, epoch: int) -> None:
        """Go on with what rank 0 has chosen; where a rank cannot, all of them fall back. wrong: why this one
        cannot."""
        if wrong := ranks.agreed(wrong):
            self._fall_back(wrong, epoch, ATTACK)

    @property
    def judged(self) -> bool:
        """Whether the net is the ledger's to judge: what the user has named is taken at his word."""
        return self.config.precision.engine == "auto"

    @property
    def gathers(self) -> bool:
        """Whether a captured step gathers its images itself."""
        return isinstance(self.loader, ResidentLoader)

    # epochs ------------------------------------------------------------------------------------------------------
    def begin(self, epoch: int, start: int, key: torch.Tensor) -> Method:
        """The method of the epoch, before its batch `start`; what is to be looked at then is."""
        method = self.method.in_epoch(epoch)
        due = (epoch - 1) % EVERY == 0 or method != self.method.in_epoch(epoch - 1)
        fresh = epoch == 1 and self.record.how == "trial"
        if start == 0 and due and not fresh and self.record.proven:
            if self.judged:
                self.look_again(epoch, key, method)
            tried = self.record.chosen.training != PLAIN_PASS and not named_training(self.config)
            if tried and (wrong := looks.at_pass(self, epoch, key, method)):
                self._fall_back(wrong, epoch, TRAINING)
        proving = self.config.precision.capture is not True and start < len(self.loader)
        while proving and self.captured is not None and self._proved != method:
            if wrong := looks.at_graph(self, self.captured, epoch, start, key, method):
                self._fall_back(f"cannot be captured: {wrong}", epoch, GRAPH)
            else:
                self._proved = method
        return method

    def feed(
        self, epoch: int, start: int
    ) -> tuple[Callable[[Any, torch.Tensor, Method], StepResult], Iterator[Any]]:
        """The step, and what it takes of each batch that is left of the epoch."""
        if self.captured is None or not isinstance(self.loader, ResidentLoader):
            return self.captured or self.step, self.loader.epoch(epoch, start=start)
        order = self.loader.key(epoch)  # the recorded step gathers and augments the images itself
        gathered = self.captured.gathered
        indices = iter(self.loader.indices(epoch, start))
        return lambda index, key, method: gathered(index, order, key, method), indices

    def look_again(self, epoch: int, key: torch.Tensor, method: Method) -> None:
        """Hold what the run goes on with to the quick part of the ledger; take the next best where it fails."""
        while wrong := looks.at_attack(self, epoch, key, method):
            if not self._fall_back(wrong, epoch, ATTACK):
                return

    def _fall_back(self, why: str, epoch: int, fault: str) -> bool:
        """Go on with the next best that does not share the fault; whether there is one."""
        failed = self.record.chosen
        self.record.refuse(failed, why, fault)
        known = [t.candidate for t in self.record.tried]
        for candidate in instead_of(failed, fault, self.record.next(), known, self.config, self.precision):
            self.forget()
            release(self.precision.device)
            wrong, _ = self._taken(candidate, [])
            if wrong:
                note(f"engine: {candidate}: {wrong}")
                self.record.refuse(candidate, wrong, GRAPH)
                continue
            note(f"engine: {failed}: {why}; {candidate} goes on")
            self.record.fallbacks.append({"epoch": epoch, "from": str(failed), "why": why, "to": str(candidate)})
            self.write()
            return True
        note(f"engine: {failed}: {why}; it goes on, as there is nothing else")
        return False

    # parts -------------------------------------------------------------------------------------------------------
    def build(self, candidate: Candidate, tuned: bool = True) -> tuple[Net, list[dict[str, Any]]]:
        check_dtype("attack_dtype", candidate.dtype, self.precision.device)  # it would be emulated, at a crawl
        precision = dataclasses.replace(self.precision, dtype=DTYPES[candidate.dtype])
        with precision.mode():  # so that what is measured is what will run
            tuned = tuned and candidate.tuned
            return build_net(candidate.net, self.model, precision, self.sample, tuned, candidate.captured)

    def take(self, candidate: Candidate, layers: list[dict[str, Any]]) -> None:
        """Go on with a candidate, and what was measured for its layers; measured now where that is empty. Raises
        what its making raises; then all is as before."""
        net, measured = self.build(candidate, tuned=not layers)
        if layers and isinstance(net, TwinNet):
            take(net, layers)
        before = self.step.net, self.step.trained
        try:
            self.step.net, self.step.trained = net, self.trained(candidate.training)
            captured = self.capture() if candidate.captured else None
        except BaseException:
            self.step.net, self.step.trained = before
            raise
        self.forget()
        if (
            DTYPES[candidate.dtype] == torch.float32 != self.precision.dtype
        ):  # the run's own mode does not see to it
            self._modes.enter_context(full_float32())
        self.captured, self._proved = captured, None
        self.record.chosen, self.record.layers = candidate, layers or measured

    def capture(self) -> capture.CapturedStep:
        capture.check_capturable(self.step, self.method)
        capture.check_batches(self.images, self.config.data.batch_size, self.config.data.last_batch)
        gather = self.loader.gather if isinstance(self.loader, ResidentLoader) else None
        return capture.CapturedStep(self.step, gather)

    def trained(self, name: str) -> torch.nn.Module:
        """The training pass of that name in `TRAININGS`, made once. Raises what its making raises."""
        if name not in self._trained:
            with self.step.precision.mode():
                self._trained[name] = TRAININGS[name](self.model, self.sample)
        return self._trained[name]

    def pass_ledger(self, inputs: Inputs) -> pass_ledger.PassLedger:
        return pass_ledger.PassLedger(self.model, self.step.precision, inputs.batch)

    def ledger(self, inputs: Inputs) -> Ledger:
        eps = float(self.config.evaluation.eps)
        return Ledger(self.model, self.step.precision, inputs.batch, eps, self.step.attack_mode)

    def inputs(self, epoch: int, start: int, key: torch.Tensor, method: Method) -> Inputs:
        """Of the epoch's step on batch `start`."""
        loader = self.loader
        if not isinstance(loader, ResidentLoader):
            batches = loader.epoch(epoch, start)
            batch = next(batches)
            with contextlib.suppress(AttributeError):
                batches.close()  # type: ignore[attr-defined]
            return Inputs(batch, key, method)
        index, order = loader.indices(epoch, start)[0], loader.key(epoch)
        return Inputs(loader.gather(index, order), key, method, (index, order), loader.gather)

    def forget(self) -> None:
        """Free what was recorded; it is recorded anew at the next step."""
        self._proved = None
        if self.captured is not None:
            self.captured.forget()

    def close(self) -> None:
        """At the end of a run."""
        self.forget()
        self._modes.close()

    def with_room(self, work: Callable[[], Any]) -> Any:
        """The result of what else a run has to do, also where its memory is taken up by what is recorded."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            if self.captured is None:
                raise
            note(f"engine: {reason(error)}; what was recorded is freed, and recorded anew afterwards")
        self.forget()
        release(self.precision.device)
        return work()

    def write(self) -> None:
        """The record into engine.json."""
        if ranks.leads():
            content = to_json(self.record.plain(), indent=1).encode()
            write_atomically(self.folder / "engine.json", content)
