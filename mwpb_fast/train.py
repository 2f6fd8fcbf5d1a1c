"""A training run: epochs and phases around the step, validation, checkpoints, stopping and going on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch

from mwpb_fast import data
from mwpb_fast.choice.engine import Engine
from mwpb_fast.choice.start import choose
from mwpb_fast.config import Config, check_axes, to_dict
from mwpb_fast.engine.build import make_engine, make_method, make_model
from mwpb_fast.engine.parallel import parallel
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.evaluation import validation
from mwpb_fast.method import Batch
from mwpb_fast.optim import Average, learning_rate, make_optimizer, set_learning_rate
from mwpb_fast.runs import checkpoint, guards, resume, trace
from mwpb_fast.runs.folder import describe, prepare
from mwpb_fast.runs.guards import TrainingError as TrainingError
from mwpb_fast.runs.log import RunLog, Waits, note, progress
from mwpb_fast.runs.together import together
from mwpb_fast.runs.view import View
from mwpb_fast.runs.writer import Writer
from mwpb_fast.step import Step
from mwpb_fast.system import ranks
from mwpb_fast.system.memory import keep_freed_memory
from mwpb_fast.system.signals import Interrupted, StopRequest, stop_requests
from mwpb_fast.system.threads import adaptive_openmp_waits


def run(
    config: Config, folder: Path, *, resume: bool = True, quiet: bool = False, view: View | None = None
) -> dict[str, Any]:
    """Train `config` in `folder` and return the last epoch's record.

    A folder that holds an earlier part of the same run is continued, exactly; with resume=False it is begun
    anew. view: how it shows itself, in place of quiet or not. Writes config.yaml, environment.json, metrics.jsonl,
    radii.json, tensorboard/ and checkpoints/; of several processes, rank 0 does. Raises ConfigError, DataError or
    CheckpointError for what the user can mend, also where another process is at work in the folder; TrainingError
    where too many steps were not finite or a guard ends the run, Interrupted after SIGTERM, SIGINT, SIGHUP or
    SIGUSR1, RanksError where another process of the run is gone.
    """
    keep_freed_memory()
    data.require_prepared(config.data)  # before there is a folder of a run that cannot be
    with together(config, folder) as config, adaptive_openmp_waits(), stop_requests() as request:
        trainer = Trainer(config, folder, request, quiet)
        trainer.view = (view or trainer.view) if ranks.leads() else View("quiet")
        if ranks.leads():  # not before what this run needs has been found
            prepare(folder, anew=not resume and not ranks.restarted())
        with trainer.precision.mode(), trainer.watchdog:
            record = trainer.train()
    if request.number:  # it came after the last look; nothing is to begin now
        raise Interrupted(request.number)
    return record


class Trainer:
    """Everything that one run holds. Its state is the model, the optimiser and the position in the data."""

    def __init__(self, config: Config, folder: Path, request: StopRequest, quiet: bool = False) -> None:
        check_axes(config)
        self.config, self.folder, self.request = config, folder, request
        self.view = View("quiet" if quiet else "lines")
        self.precision = make_precision(config.precision)
        device, layout = self.precision.device, self.precision.memory_format
        self.images = data.load_split(config.data, "train")
        self.train_index, self.val_index = data.split_indices(self.images.labels, config.data)
        if self.images.num_classes < 2:
            raise data.DataError(f"{self.images.origin}: has fewer than two classes; nothing is to be told apart")
        self.loader = data.make_loader(
            self.images, config.data, seed=config.seed, device=device, train_index=self.train_index, layout=layout
        )
        self.normalize = self.images.statistics(self.train_index) if config.model.normalize else None
        torch.manual_seed(ops.derive_seed(config.seed))
        sample, sync_bn = self._sample(), config.distributed.sync_bn
        smallest = data.smallest_batch(len(self.train_index), config.data) // (1 if sync_bn else ranks.count())
        classes, name = self.images.num_classes, config.model.name
        self.model = make_model(name, classes, self.normalize, sample, smallest, self.precision)
        self.ema = Average(self.model, config.optim.ema) if config.optim.ema else None
        self.method = make_method(config)
        self.method.remember(len(self.images), device)
        whole = parallel(self.model, sample, self.precision, sync_bn)
        net, layers = make_engine(self.model, config, self.precision.attack, sample)
        self.step = Step(
            model=whole,
            net=net,
            optimizer=make_optimizer(self.model, config.optim),
            precision=self.precision,
            attack_mode=config.attack_mode,
            natural_pass=config.natural_pass,
            clip_norm=config.optim.clip_norm,
            average=self.ema,
            merge_statistics=not sync_bn,
        )
        parts = (config, self.model, self.step, self.method, self.loader, sample)
        self.engine = Engine(*parts, images=len(self.train_index), layers=layers, folder=folder)
        self.parts = resume.Parts(
            self.model, self.step.optimizer, self.step.scaler, self.ema, self.method.memory, self.engine, device
        )
        self.writer = Writer(folder / "checkpoints", device, config.keep)
        self.guards = guards.Guards(config, folder, self.writer, len(self.loader))
        self.watchdog = self.guards.watchdog(lambda: f"epoch {self.at.epoch}, after batch {self.at.batch}")
        self.at = resume.Position(torch.zeros(len(self.loader), trace.COLUMNS, device=device))

    def _sample(self) -> torch.Tensor:
        """A batch of training images, without augmentation."""
        index = self.train_index[: self.config.data.batch_size // ranks.count()]
        return next(self._plain_batches(index, len(index))()).x

    def train(self) -> dict[str, Any]:
        """From wherever the run stands to its last epoch."""
        self._claim_folder()
        tracker = self.view.tracker(self.folder, self.config)
        log = RunLog(self.folder, self.at.epoch, tracker) if ranks.leads() else None
        record: dict[str, Any] = {}
        try:
            while self.at.epoch <= self.config.epochs:
                try:
                    record = self._train_epoch()
                    record |= self.validate()
                    record |= self.guards.epoch(record)
                except guards.GuardError as error:
                    self._go_back(error, log)
                else:
                    self._finish_epoch(record, log)
            self.writer.wait()
            # with nothing held out best is the last model, also where a run is longer than when it was saved
            if len(self.val_index) == 0 or not checkpoint.existing(self.folder / "checkpoints", "best"):
                self._save("best")
            if ranks.leads():
                self._write_radii()
        finally:
            if log is not None:
                log.close()
            self.writer.close()
            self.loader.close()
            self.engine.close()
        return record

    def _train_epoch(self) -> dict[str, Any]:
        epoch, config = self.at.epoch, self.config
        rate = learning_rate(config.optim, epoch) * config.guard.rate**self.at.rollbacks
        set_learning_rate(self.step.optimizer, rate)
        key = self._key(epoch)
        method = self.engine.begin(epoch, self.at.batch, key)
        started, first, stopped = time.monotonic(), self.at.batch, 0
        size = config.data.batch_size
        whole, label = min(len(self.loader) * size, len(self.train_index)), f"epoch {epoch}/{config.epochs}"
        with progress(whole, label, done=first * size, form=self.view.form) as bar:
            looked = started
            take_step, feed = self.engine.feed(epoch, first)
            batches = Waits(feed)
            for batch in batches:
                result = take_step(batch, key, method)
                self.at.trace[self.at.batch] = trace.row(*result)
                self.at.batch += 1
                self.watchdog.beat()
                note = status = ""
                # all processes look, and stop, after the same step
                stopped, look = ranks.most(self.request.number, time.monotonic() - looked > 1.0)
                if look:  # the only wait for the device within an epoch
                    looked = time.monotonic()
                    note, status = self.view.step(bar, self.at.trace[self.at.batch - 1], config.epochs - epoch)
                    self._check_steps()
                    if any(ranks.most(ranks.leads() and self.writer.due)):
                        guards.compare(self.step.state(self.method), epoch)
                        if ranks.leads():
                            self.writer.within(self.state, self.at.within(looked - started, batches.seconds))
                bar.advance(len(result.radius), note, status)
                if stopped:
                    break
        rows, bad, found = self._check_steps()
        if self.at.batch > first:
            self.at.seconds += time.monotonic() - started
            self.at.waited += batches.seconds
        guards.compare(self.step.state(self.method), epoch)
        if stopped:
            self._save("last")
            raise Interrupted(stopped)
        return {
            "epoch": epoch,
            "phase": "warmup" if epoch <= config.warmup_epochs else "main",
            **trace.figures(rows, config.optim.clip_norm),
            "learning_rate": rate,
            **self.at.speed(min(self.at.batch * size, len(self.train_index))),
            "bad_steps": len(bad),
            "bad_batches": bad,
            **found,
        }

    def _key(self, epoch: int) -> torch.Tensor:
        """The seed of the epoch's noise."""
        return torch.tensor([ops.derive_seed(self.config.seed, epoch)], device=self.precision.device)

    def _check_steps(self) -> tuple[torch.Tensor, list[int], dict[str, str]]:
        """The epoch's trace so far, the batches whose steps were bad, and what the guard of divergence found."""
        rows = ranks.led(lambda: self.at.trace[: self.at.batch].cpu())  # so that all judge alike
        return rows, *self.guards.steps(rows, self.at.epoch)

    def _go_back(self, error: guards.GuardError, log: RunLog | None) -> None:
        """To a state before what a guard has found."""
        path, state = self.guards.state_before(error, self.at.rollbacks)
        self.engine.forget()  # a recorded step has the optimiser's tensors in it, which are others from here on
        self.parts.load(path, state, self.at)
        if log is not None:
            log.go_back(self.at.epoch)

    def validate(self) -> dict[str, Any]:
        """Natural and PGD-10 accuracy in % on the held-out images; nothing where none are due or held out."""
        evaluation, epoch, started, stopped = self.config.evaluation, self.at.epoch, time.monotonic(), 0
        batches = self._plain_batches(self.val_index.tensor_split(ranks.count())[ranks.place().rank])
        due = epoch % evaluation.validate_every == 0 or epoch == self.config.epochs
        if not due or len(self.val_index) == 0:
            return {}
        model = self.model if self.ema is None else self.ema.module
        looks = (model, batches, float(evaluation.eps), epoch, self.precision, self._tick)
        try:
            right = self.engine.with_room(lambda: validation.right(*looks, self.config.guard.collapse > 0))
        except Interrupted as stop:
            stopped = stop.number
        (stopped,) = ranks.most(stopped)
        if stopped:
            self._save("last")
            raise Interrupted(stopped)
        return validation.accuracies(right) | {"validation": time.monotonic() - started}

    def _save(self, kind: str) -> None:
        if ranks.leads():
            self.writer.now(self.state(), kind)

    def _finish_epoch(self, record: dict[str, Any], log: RunLog | None) -> None:
        self.at.next_epoch()
        kinds = ["last"]
        score = (record.get("robust", -1.0), record.get("natural", -1.0))
        if "robust" in record and score > (self.at.best.get("robust", -1.0), self.at.best.get("natural", -1.0)):
            self.at.best = {k: record[k] for k in ("epoch", "natural", "robust")}
            kinds = ["best", "last"]  # what last knows of the best one is there before it
        if log is None:
            return
        record["checkpoint"] = self.writer.take(self.state(), *kinds)
        log.write(record)  # before they can be there: records of epochs that are done again are dropped
        self.writer.begin()
        self.view.epoch(record, self.config.epochs)

    def state(self, at: resume.Position | None = None) -> dict[str, Any]:
        """Everything that a resumed run needs, in tensors and plain types. at: where it stands."""
        about = checkpoint.MARK | {
            "config": to_dict(self.config),
            "classes": list(self.images.classes),
            "channels": self.images.channels,
            "data": data.identity(self.images),
            "normalize": self.normalize,
        }
        return about | self.parts.state(at or self.at)

    def _claim_folder(self) -> None:
        config, path = to_dict(self.config), Path()
        found = ranks.led(lambda: resume.find(self.folder, self.config))
        if found is not None:
            path, state = Path(found[0]), found[1]
            data.require_same(self.folder, state, self.images)
            self.parts.load(path, state, self.at)
            self.engine.write()
        if (done := self.at.epoch - 1) > self.config.epochs:
            note(f"{self.folder} has done {done} epochs, more than the {self.config.epochs} asked for")
            config["epochs"] = done  # what the folder holds
        device = str(self.precision.device)
        self.view.begin(self.config, self.folder, len(self.train_index), device, done, path.name)
        if found is None:
            choose(self.engine, self.at.epoch, self._key(self.at.epoch), self.view.form != "lines")
        if ranks.leads():
            describe(self.folder, config, self.precision.device, anew=found is None)

    @property
    def choices(self) -> list[dict[str, Any]]:
        """What was chosen for each layer of the twin, by measurement."""
        return self.engine.record.layers

    def _tick(self, images: int = 0) -> None:
        self.watchdog.beat()
        if self.request.number:
            raise Interrupted(self.request.number)

    def _plain_batches(self, index: torch.Tensor, size: int = 0) -> Callable[[], Iterator[Batch]]:
        size = size or self.config.evaluation.batch_size
        device, layout = self.precision.device, self.precision.memory_format
        return lambda: data.eval_batches(self.images, device, size, index, layout)

    def _write_radii(self) -> None:
        best = (self.folder, self.config, self.model, self.train_index, self._plain_batches(self.train_index))
        with ranks.alone():  # "last" is saved, so a stop loses nothing
            validation.write_radii(*best, self.method.budget, self.precision, self._tick)
