"""Attacks over a test set: sharded, resumable, in float32, and with all that a result depends on on record."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mwpb_fast import data
from mwpb_fast.config import Config, ConfigError, EvaluationConfig, from_dict, to_dict
from mwpb_fast.engine.precision import Precision, make_precision
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.contract import Attack
from mwpb_fast.evaluation.score import format_table, summary, worst
from mwpb_fast.evaluation.session import Job
from mwpb_fast.models import build_model, load_weights, read_checkpoint
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import progress
from mwpb_fast.system.files import to_json, write_atomically
from mwpb_fast.system.memory import keep_freed_memory
from mwpb_fast.system.processes import Crew, crew, orphaned
from mwpb_fast.system.signals import Interrupted, stop_requests
from mwpb_fast.system.threads import watched

__all__ = [
    "assist",
    "evaluate",
    "evaluate_run",
    "format_table",
    "own_config",
    "read_weights",
    "result_path",
    "work",
]

FORMAT = 2
TestSet = data.Images | tuple[torch.Tensor, torch.Tensor]
Help = Callable[[int], AbstractContextManager[Crew]]


def evaluate(
    model: torch.nn.Module,
    images: TestSet,
    config: EvaluationConfig,
    precision: Precision,
    *,
    folder: Path | None = None,
    seed: int = 0,
    show: bool = True,
    about: dict[str, Any] | None = None,
    tick: Callable[[], None] = lambda: None,
    help: Help = lambda unfinished: nullcontext(Crew()),
    extra: dict[str, Attack] | None = None,
    save: bool = True,
) -> dict[str, Any]:
    """Attack `model` on a test set by the attacks of `config` and return what came out, in plain types.

    model: in eval mode, float32 weights, on the precision's device; it is left as it was. images: a data set's
    Images, or (x, y) with x (N, C, H, W) float in [0, 1] and y (N,) int64. folder: keeps finished shards, so
    that the same call goes on after a kill; the result goes to the same path with .json if `save`; or None.
    about: more entries of the result. tick: called before every forward pass, may raise to stop. help: given
    the number of unfinished shards of the long attacks, the processes that do their part of them by `work`.
    extra: attacks besides those that the configuration names.

    The result holds for each attack the accuracy in percent, its 95 % Wilson interval, a flag 0 or 1 for each
    image, and the ball that it kept to; under "worst" the point-wise worst case, see score.worst; under
    "warnings" what makes it doubtful. Raises EvaluationError and ConfigError, in one line.
    """
    job = _job(model, images, config, precision, folder, seed, tick, extra)
    with job.ready():
        attacks = {name: job.attack(name) for name in job.attacks}
        long = [attack for attack in attacks.values() if attack.attack.long]
        with help(sum(len(attack.unfinished) for attack in long)) as others:
            for name, attack in attacks.items():
                share = 1 + others.count if attack in long else 1
                mine = range(0, len(attack.shards), share)
                with progress(len(attack.index), name) if show else nullcontext() as bar:
                    report = bar.advance if bar else lambda images: None
                    attack.run(job.model, mine, report)
                    if share > 1:
                        others.wait(tick)
                        attack.run(job.model, [n for n in range(len(attack.shards)) if n not in mine], report)
    results = {name: summary(attack, len(job.index)) for name, attack in attacks.items()}
    result = {
        "format": FORMAT,
        **(about or {}),
        **job.describe(),
        "preview": job.preview,
        "attacks": results,
        **worst({name: results[name] for name in config.attacks}, job.index.tolist(), job.setting),
        "warnings": {k: v for r in results.values() for k, v in r.get("warnings", {}).items()},
    }
    if folder is not None and save:
        write_atomically(Path(f"{folder}.json"), (to_json(result, indent=1) + "\n").encode())
    return result


def work(
    model: torch.nn.Module,
    images: TestSet,
    config: EvaluationConfig,
    precision: Precision,
    *,
    folder: Path,
    seed: int,
    part: int,
    parts: int,
    tick: Callable[[], None],
) -> None:
    """What one of a crew does: its part, from 1 to parts - 1, of the shards of `evaluate`'s long attacks."""
    job = _job(model, images, config, precision, folder, seed, tick)
    with job.ready():
        for name in config.attacks:
            if find_attack(name).long:
                attack = job.attack(name)
                attack.run(job.model, range(part, len(attack.shards), parts))


def _job(
    model: torch.nn.Module,
    images: TestSet,
    config: EvaluationConfig,
    precision: Precision,
    folder: Path | None,
    seed: int,
    tick: Callable[[], None],
    extra: dict[str, Attack] | None = None,
) -> Job:
    pixels, labels = (images.images, images.labels) if isinstance(images, data.Images) else images
    return Job(model, pixels, labels.cpu(), config, precision, folder, seed, tick, extra or {})


def evaluate_run(
    target: Path,
    evaluation: EvaluationConfig | None = None,
    which: str = "best",
    data_dir: Path | str | None = None,
    *,
    device: str | None = None,
    config: Config | None = None,
    seed: int = 0,
    processes: int | None = None,
    show: bool = True,
    extra: Callable[[Config], dict[str, Attack]] = lambda config: {},
    save: bool = True,
) -> dict[str, Any]:
    """Evaluate a run folder's best or last checkpoint, one checkpoint, or a file of weights, on the test split.

    evaluation, data_dir, device: instead of the run's own. config: says the model and data set of a bare file of
    weights. processes: how many share the long attacks on the CPU; as many as there are threads if None. The
    result goes to evaluation-<which>.json in the run folder, beside the file for a file; finished shards are
    kept in the folder of the same name, and the same call goes on from them. extra: from the run's configuration
    to attacks besides the named ones; save: whether to write the result. Raises ConfigError, DataError and
    CheckpointError for what the user can mend, and Interrupted after SIGTERM or SIGINT.
    """
    saved = _read(Path(target), which, config)
    setup = _Setup(saved, evaluation, data_dir, device, config)
    job = {
        "target": str(target),
        "which": which,
        "data_dir": None if data_dir is None else str(data_dir),
        "device": device,
        "seed": seed,
        "config": to_dict(replace(setup.config, evaluation=setup.evaluation)),
    }
    threads = torch.get_num_threads()

    @contextlib.contextmanager
    def help(unfinished: int) -> Iterator[Crew]:
        hands = min(threads, len(os.sched_getaffinity(0)), unfinished) if processes is None else processes
        if setup.precision.device.type != "cpu" or min(hands, unfinished) < 2:
            yield Crew()
            return
        parts = [json.dumps(job | {"part": part, "parts": hands}) for part in range(1, hands)]
        each = max(1, threads // hands)
        torch.set_num_threads(each)
        try:
            with crew("from mwpb_fast.evaluation.evaluate import assist; assist()", parts, each) as helpers:
                yield helpers
        finally:
            torch.set_num_threads(threads)

    with watched(), stop_requests() as request:

        def tick() -> None:
            if request.number:
                raise Interrupted(request.number)

        return evaluate(
            setup.model,
            setup.images,
            setup.evaluation,
            setup.precision,
            folder=saved.results,
            seed=seed,
            show=show,
            about=saved.about | setup.about,
            tick=tick,
            help=help,
            extra=extra(setup.config),
            save=save,
        )


def assist() -> None:
    """What a helper process of `evaluate_run` does: the part that the first argument gives, in JSON."""
    job, parent = json.loads(sys.argv[1]), int(sys.argv[2])
    config = from_dict(job["config"])
    saved = _read(Path(job["target"]), job["which"], config)
    setup = _Setup(saved, config.evaluation, job["data_dir"], job["device"], config)

    def tick() -> None:
        if orphaned(parent):
            raise SystemExit(1)

    work(
        setup.model,
        setup.images,
        setup.evaluation,
        setup.precision,
        folder=saved.results,
        seed=job["seed"],
        part=job["part"],
        parts=job["parts"],
        tick=tick,
    )


@dataclass(frozen=True)
class _Saved:
    """A file with weights. config: of the run that wrote it, or the given one. results: see evaluate's folder."""

    state: dict[str, Any]
    config: Config
    results: Path
    about: dict[str, Any]


def result_path(target: Path, which: str, kind: str = "evaluation") -> Path:
    """Where a result of that kind about a run's best or last checkpoint, or a file, is kept; less its suffix."""
    return target / f"{kind}-{which}" if target.is_dir() else target.parent / f"{kind}-{target.stem}"


def read_weights(target: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """The newest undamaged best or last checkpoint of a run's folder, or the file that `target` is: path, content.

    A file with a SHA-256 sidecar, as every checkpoint of a run has one, is held to it. Raises CheckpointError.
    """
    if target.is_dir():
        found = checkpoint.read_newest(target / "checkpoints", which)
        if found is None:
            raise checkpoint.CheckpointError(f"{target}: no {which} checkpoint in it; train it first")
        return found
    if target.suffix == ".pt" and target.with_suffix(".pt.sha256").exists():
        return target, checkpoint.read(target)
    try:
        return target, read_checkpoint(target)
    except ValueError as error:
        raise checkpoint.CheckpointError(str(error)) from error


def own_config(path: Path, state: dict[str, Any]) -> Config | None:
    """The configuration of the run that wrote a checkpoint; None for bare weights. Raises ConfigError."""
    if not isinstance(state.get("config"), dict) or "model" not in state:
        return None
    try:
        return from_dict(state["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def finished_epoch(state: dict[str, Any]) -> int:
    """The epoch that a checkpoint's weights are from. One that a run goes on from, known by its "batch", names the
    epoch in which it does: the next one where no batch of it is done."""
    return int(state["epoch"]) - (state.get("batch") == 0)


def _read(target: Path, which: str, config: Config | None) -> _Saved:
    path, state = read_weights(target, which)
    own = own_config(path, state)
    config = own or config
    if config is None:
        raise checkpoint.CheckpointError(f"{path}: holds weights only; say which model and data set they are for")
    about: dict[str, Any] = {"checkpoint": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if own:
        text = json.dumps(state["config"], sort_keys=True)
        about |= {"recipe": own.recipe, "epoch": finished_epoch(state)}
        about |= {"which": which if target.is_dir() else None}
        about |= {"config_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return _Saved(state, config, result_path(target, which), about)


class _Setup:
    """Model, test split and precision of an evaluation by `evaluate_run`."""

    def __init__(
        self,
        saved: _Saved,
        evaluation: EvaluationConfig | None,
        data_dir: Path | str | None,
        device: str | None,
        given: Config | None,
    ) -> None:
        keep_freed_memory()
        self.config = config = saved.config
        self.evaluation = evaluation or config.evaluation
        for name in self.evaluation.attacks:
            find_attack(name)
        asked = config.precision if device is None else replace(config.precision, device=device)
        self.precision = make_precision(replace(asked, dtype="fp32", attack_dtype="auto"))
        where = config.data if data_dir is None else replace(config.data, dir=str(data_dir))
        self.images = data.load_split(where, "test")
        state = saved.state
        normalize = state.get("normalize")
        if "config" not in state and config.model.normalize:
            train = data.load_split(where, "train")
            normalize = train.statistics(data.split_indices(train.labels, where)[0])
        trained, mine = data.identity_of(state), data.identity(self.images)
        if other := data.difference(trained, {key: mine[key] for key in data.KIND}):
            raise ConfigError(f"{self.images.origin}: not the data of the checkpoint, which has {other}")
        try:
            self.model = build_model(
                config.model.name,
                num_classes=self.images.num_classes,
                channels=self.images.channels,
                normalize=normalize,
            )
            load_weights(self.model, state.get("ema") or state.get("model") or state)
        except (
            ValueError,
            TypeError,
            AttributeError,
            ImportError,
            LookupError,
        ) as error:  # of the user's own code
            raise checkpoint.CheckpointError(f"{saved.about['checkpoint']}: {error}") from error
        self.model.to(self.precision.device).to(memory_format=self.precision.memory_format).eval()  # type: ignore[call-overload]
        self.about = {"model": config.model.name, "data": config.data.name, "split": "test"}
        self.about["split_sha256"] = self.images.sha256
