"""A training run: epochs and phases around the step, validation, checkpoints, stopping and going on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
import yaml

from mwpb_fast import checkpoint, data
from mwpb_fast.attacks import pgd
from mwpb_fast.attacks.accuracy import correct
from mwpb_fast.attacks.inner import cross_entropy
from mwpb_fast.config import Config, ConfigError, check_axes, from_dict, to_dict
from mwpb_fast.engine import capture
from mwpb_fast.engine.build import compiled, make_engine
from mwpb_fast.engine.net import EagerNet, module_mode
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.engine.tune import take
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.files import write_atomically
from mwpb_fast.log import RunLog, Waits, environment, epoch_line, progress
from mwpb_fast.memory import keep_freed_memory
from mwpb_fast.models import build_model
from mwpb_fast.optim import Average, learning_rate, make_optimizer, set_learning_rate
from mwpb_fast.runfolder import clear, held
from mwpb_fast.signals import Interrupted, StopRequest, stop_requests
from mwpb_fast.step import Step, StepResult

# what may change when a run goes on: options, or some of a group's. Not evaluation.eps, at which the best epoch is
# chosen; both loaders give the same batches.
FREE = {
    "epochs": None,
    "recipe": None,
    "data": {"dir", "loader", "threads"},
    "precision": {"device"},
    "evaluation": {"attacks", "step_size", "batch_size", "subset", "costly_subset", "validate_every"},
}


class TrainingError(RuntimeError):
    """Training cannot go on; one line."""


def run(config: Config, folder: Path, *, resume: bool = True, quiet: bool = False) -> dict[str, Any]:
    """Train `config` in `folder` and return the last epoch's record.

    A folder that holds an earlier part of the same run is continued, exactly; with resume=False it is begun
    anew. Writes config.yaml, environment.json, metrics.jsonl, radii.json, tensorboard/ and checkpoints/.
    Raises ConfigError, DataError or CheckpointError for what the user can mend, also where another process is at
    work in the folder; TrainingError where too many steps were not finite, Interrupted after SIGTERM or SIGINT.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    with held(folder), stop_requests() as request:
        trainer = Trainer(config, folder, request, quiet)
        if not resume:  # not before what this run needs has been found
            clear(folder)
        with trainer.precision.mode():
            record = trainer.train()
    if request.number:  # it came after the last look; nothing is to begin now
        raise Interrupted(request.number)
    return record


class Trainer:
    """Everything that one run holds. Its state is the model, the optimiser and the position in the data."""

    def __init__(self, config: Config, folder: Path, request: StopRequest, quiet: bool = False) -> None:
        check_axes(config)
        self.config, self.folder, self.request, self.quiet = config, folder, request, quiet
        self.precision = make_precision(config.precision)
        device = self.precision.device
        self.images = data.load_split(config.data, "train")
        self.train_index, val_index = data.split_indices(self.images.labels, config.data)
        self.val_index = val_index
        self.loader = data.make_loader(
            self.images, config.data, seed=config.seed, device=device, train_index=self.train_index
        )
        self.normalize = self.images.statistics(self.train_index) if config.model.normalize else None
        torch.manual_seed(ops.derive_seed(config.seed))
        try:
            model = build_model(
                config.model.name,
                num_classes=self.images.num_classes,
                channels=self.images.channels,
                normalize=self.normalize,
            )
        except ValueError as error:
            raise ConfigError(f"model.name: {error}") from error
        self.model = model.to(device=device, memory_format=self.precision.memory_format)  # type: ignore[call-overload]
        self.ema = Average(self.model, config.optim.ema) if config.optim.ema else None
        self.warmup, self.budget = config.warmup.build(), config.budget.build()
        self.axes = {
            "attack": config.attack.build(),
            "objective": config.objective.build(),
            "perturb": config.perturbation.build(),
        }
        self.memory: dict[str, dict[str, torch.Tensor]] = {}
        for name, axis in self.axes.items():
            if hasattr(axis, "remember"):
                axis.remember(len(self.images), device)
                self.memory[name] = axis.memory
        net, self.choices = make_engine(self.model, config, self.precision.attack, self._sample())
        self.step = Step(
            model=compiled(self.model, device) if config.precision.compile else self.model,
            net=net,
            **self.axes,
            optimizer=make_optimizer(self.model, config.optim),
            precision=self.precision,
            attack_mode=config.attack_mode,
            average=self.ema,
        )
        self.captured = self._capture() if config.precision.capture else None
        self.epoch, self.batch = 1, 0
        # of this epoch: spent on its batches, and thereof in waiting for them
        self.seconds, self.waited = 0.0, 0.0
        self.best: dict[str, Any] = {}
        self.trace = self._new_trace()

    def _sample(self) -> torch.Tensor:
        """A batch of training images, without augmentation."""
        index = self.train_index[: self.config.data.batch_size]
        return next(data.eval_batches(self.images, self.precision.device, len(index), index)).x

    def _capture(self) -> capture.CapturedStep:
        capture.check_batches(len(self.train_index), self.config.data.batch_size, self.config.data.last_batch)
        gather = self.loader.gather if isinstance(self.loader, data.ResidentLoader) else None
        return capture.CapturedStep(self.step, gather)

    # the run --------------------------------------------------------------------------------------------------
    def train(self) -> dict[str, Any]:
        """From wherever the run stands to its last epoch."""
        self._claim_folder()
        log = RunLog(self.folder)
        log.forget_from(self.epoch)
        record: dict[str, Any] = {}
        try:
            while self.epoch <= self.config.epochs:
                record = self._train_epoch()
                record |= self.validate()
                log.write(record)
                self._finish_epoch(record)
            # with nothing held out best is the last model, also where a run is longer than when it was saved
            if len(self.val_index) == 0 or not checkpoint.existing(self.folder / "checkpoints", "best"):
                self._save("best")
            self._write_radii()
        finally:
            log.close()
            self.loader.close()
            if self.captured is not None:
                self.captured.forget()
        return record

    def _train_epoch(self) -> dict[str, Any]:
        epoch, config = self.epoch, self.config
        warm = epoch <= config.warmup_epochs
        budget = self.warmup if warm else self.budget
        rate = learning_rate(config.optim, epoch)
        set_learning_rate(self.step.optimizer, rate)
        for name, axis in self.axes.items():
            setattr(self.step, name, axis.in_epoch(epoch) if hasattr(axis, "in_epoch") else axis)
        key = torch.tensor([ops.derive_seed(config.seed, epoch)], device=self.precision.device)
        label = f"epoch {epoch}/{config.epochs}"
        started, first, stopped = time.monotonic(), self.batch, False
        size = config.data.batch_size
        with progress(len(self.loader) * size, label, done=first * size) as bar:
            looked = started
            take_step, feed = self._feed()
            batches = Waits(feed)
            for batch in batches:
                result = take_step(*batch, key, budget)
                self.trace[self.batch] = _row(result)
                self.batch += 1
                note = ""
                if time.monotonic() - looked > 1.0:  # the only wait for the device within an epoch
                    looked = time.monotonic()
                    note = f"loss {self.trace[self.batch - 1, 0].item():.3f}"
                    self._check_finite()
                bar.advance(len(result.radius), note)
                if self.request.number:
                    stopped = True
                    break
        trace, bad = self._check_finite()
        if self.batch > first:
            self.seconds += time.monotonic() - started
            self.waited += batches.seconds
        if stopped:
            self._save("last")
            raise Interrupted(self.request.number)
        good = trace[trace[:, 4] > 0]
        return {
            "epoch": epoch,
            "phase": "warmup" if warm else "main",
            "loss": good[:, 0].mean().item(),
            "radius_min": trace[:, 1].min().item(),
            "radius_mean": trace[:, 2].mean().item(),
            "radius_max": trace[:, 3].max().item(),
            "learning_rate": rate,
            "images_per_second": self.batch * size / self.seconds,
            "seconds": self.seconds,
            "wait_share": self.waited / self.seconds,
            "bad_steps": len(bad),
            "bad_batches": bad,
        }

    def _feed(self) -> tuple[Callable[..., StepResult], Iterable[tuple[torch.Tensor, ...]]]:
        """The step, and what it takes of each batch that is left of the epoch."""
        if self.captured is None or not isinstance(self.loader, data.ResidentLoader):
            return self.captured or self.step, self.loader.epoch(self.epoch, start=self.batch)
        order = self.loader.key(self.epoch)  # the recorded step gathers and augments the images itself
        indices = self.loader.indices(self.epoch, self.batch)
        return self.captured.gathered, ((index, order) for index in indices)

    def _check_finite(self) -> tuple[torch.Tensor, list[int]]:
        """The epoch's trace so far, and the batches whose steps were bad."""
        trace = self.trace[: self.batch].cpu()
        bad = (trace[:, 4] == 0).nonzero().flatten().tolist()
        if len(bad) > self.config.max_bad_steps or len(bad) == len(self.loader):
            raise TrainingError(
                f"epoch {self.epoch}: loss or gradient not finite in {len(bad)} of {self.batch} steps "
                f"(batches {bad[:10]} ...); the weights are those of the last good step"
            )
        return trace, bad

    def validate(self) -> dict[str, Any]:
        """Natural and PGD-10 accuracy in % on the held-out images; nothing where none are due or held out."""
        evaluation, device = self.config.evaluation, self.precision.device
        due = self.epoch % evaluation.validate_every == 0 or self.epoch == self.config.epochs
        if not due or len(self.val_index) == 0:
            return {}
        model = self.model if self.ema is None else self.ema.module
        net = EagerNet(model, self.precision)
        devices = [device] if device.type == "cuda" else []
        attack = pgd.Config(start="uniform").build()
        key = torch.tensor([ops.derive_seed(0, self.epoch)], device=device)

        def perturb(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            radius = torch.full(y.shape, float(evaluation.eps), device=device)
            return attack(net, x, y, None, radius, cross_entropy, key, index)

        try:
            # whatever the model draws here, training goes on as if there had been no validation, or a part of one
            with module_mode(model, training=False), torch.random.fork_rng(devices):
                natural = correct(net, self._plain_batches(self.val_index), tick=self._tick)
                robust = correct(net, self._plain_batches(self.val_index), perturb, self._tick)
        except Interrupted:
            self._save("last")
            raise
        return {"natural": 100 * natural.float().mean().item(), "robust": 100 * robust.float().mean().item()}

    def _finish_epoch(self, record: dict[str, Any]) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.seconds, self.waited = 0.0, 0.0
        self.trace = self._new_trace()
        score = (record.get("robust", -1.0), record.get("natural", -1.0))
        if "robust" in record and score > (self.best.get("robust", -1.0), self.best.get("natural", -1.0)):
            self.best = {k: record[k] for k in ("epoch", "natural", "robust")}
            self._save("best")
        self._save("last")
        if not self.quiet:
            print(epoch_line(record, self.config.epochs), flush=True)

    # state ----------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in tensors and plain types."""
        return {
            "config": to_dict(self.config),
            "classes": list(self.images.classes),
            "channels": self.images.channels,
            "data": data.identity(self.images),
            "normalize": self.normalize,
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "waited": self.waited,
            "best": self.best,
            "trace": self.trace,
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "memory": self.memory,
            "choices": self.choices,
            "averaged": 0 if self.ema is None else self.ema.steps,
            "random": checkpoint.random_state(self.precision.device),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.model.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        if self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.steps = state["averaged"]
        for name, memory in self.memory.items():
            for key, values in memory.items():
                values.copy_(state["memory"][name][key])
        self.choices = state.get("choices", [])
        if self.choices and isinstance(self.step.net, TwinNet):
            take(self.step.net, self.choices)
        self.epoch, self.batch, self.best = state["epoch"], state["batch"], state["best"]
        self.seconds, self.waited = state["seconds"], state["waited"]
        self.trace = state["trace"].to(self.precision.device)
        checkpoint.set_random_state(state["random"], self.precision.device)  # last: what is above may draw

    def _save(self, kind: str) -> None:
        state = self.state()
        epoch, batch = self.epoch, self.batch
        if kind == "best":
            # what is evaluated: the averaged weights where there are any, named after the epoch that made them
            weights = state["ema"] or state["model"]
            state = {k: state[k] for k in ("config", "classes", "channels", "data", "normalize", "best", "memory")}
            epoch, batch = epoch - 1, 0
            state |= {"epoch": epoch, "model": weights}
        checkpoint.save(self.folder / "checkpoints", kind, epoch, batch, state, keep=1 if kind == "best" else 2)

    def _claim_folder(self) -> None:
        path, mine = self.folder / "config.yaml", to_dict(self.config)
        found = checkpoint.read_newest(self.folder / "checkpoints", "last")
        if found is not None:
            theirs = to_dict(from_dict(found[1]["config"]))  # options that it did not know have their defaults
            differing = sorted(k for k in mine if _binding(k, mine) != _binding(k, theirs))
            if differing:
                raise ConfigError(
                    f"{self.folder} holds a run with other settings ({', '.join(differing)}); "
                    "take another --out, or --no-resume to begin anew"
                )
            data.require_same(self.folder, found[1], self.images)
            if "random" not in found[1]:
                raise checkpoint.CheckpointError(
                    f"{found[0]}: of an earlier version, which did not save all that a run needs to go on "
                    "exactly; --no-resume begins anew"
                )
            self.load_state(found[1])
            if not self.quiet and self.epoch <= self.config.epochs:
                print(f"resuming from {found[0].name}", flush=True)
        else:
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        if self.choices:
            write_atomically(self.folder / "engine.json", json.dumps(self.choices, indent=1).encode())
        write_atomically(path, yaml.safe_dump(mine, sort_keys=False).encode())
        write_atomically(
            self.folder / "environment.json", json.dumps(environment(self.precision.device), indent=1).encode()
        )

    def _tick(self, images: int = 0) -> None:
        if self.request.number:
            raise Interrupted(self.request.number)

    def _new_trace(self) -> torch.Tensor:
        return torch.zeros(len(self.loader), 5, device=self.precision.device)

    def _plain_batches(self, index: torch.Tensor) -> Iterator[data.Batch]:
        return data.eval_batches(self.images, self.precision.device, self.config.evaluation.batch_size, index)

    def _write_radii(self) -> None:
        found = checkpoint.read_newest(self.folder / "checkpoints", "best")
        assert found is not None
        self.model.load_state_dict(found[1]["model"])
        net, radii = EagerNet(self.model, self.precision), []
        remembered = found[1].get("memory", {}).get("attack", {}).get("radius")
        if remembered is not None:  # by an attack that finds every image's radius itself
            radii.append(remembered[self.train_index])
        else:
            with module_mode(self.model, training=False):
                for x, y, _ in self._plain_batches(self.train_index):
                    self._tick()  # "last" is saved
                    radii.append(self.budget(net.logits(x), y).cpu())
        content = {
            "epoch": found[1]["epoch"],
            "budget": to_dict(self.config)["budget"],
            "radii": torch.cat(radii).tolist(),
        }
        write_atomically(self.folder / "radii.json", json.dumps(content).encode())


def _binding(key: str, config: dict[str, Any]) -> Any:
    """What an earlier part of a run binds the rest to, of one value of the configuration."""
    free = FREE.get(key, set())
    if free is None:
        return None
    return {k: v for k, v in config[key].items() if k not in free} if free else config[key]


def _row(result: StepResult) -> torch.Tensor:
    radius = result.radius
    return torch.stack((result.loss.float(), radius.min(), radius.mean(), radius.max(), result.finite.float()))
