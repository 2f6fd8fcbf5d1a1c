"""From a run's folder or a file to its evaluation, by this process and helpers of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mwpb_fast import data
from mwpb_fast.config import Config, ConfigError, EvaluationConfig, PrecisionConfig, from_dict
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.engine.trial import channels_last_is_why
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.contract import EvaluationAttack
from mwpb_fast.evaluation.evaluate import attack_all, attack_share, place, write_result
from mwpb_fast.evaluation.filled import named_model, read_file, split
from mwpb_fast.evaluation.layout import faster_layout
from mwpb_fast.evaluation.model_checks import Model
from mwpb_fast.evaluation.named import find, is_name
from mwpb_fast.evaluation.request import Request
from mwpb_fast.evaluation.session import Session, TestSet
from mwpb_fast.evaluation.superseded import keep_earlier
from mwpb_fast.models import build_model, load_weights
from mwpb_fast.runs import checkpoint
from mwpb_fast.system import ranks
from mwpb_fast.system.memory import keep_freed_memory
from mwpb_fast.system.processes import Helpers, helper_processes, orphaned
from mwpb_fast.system.signals import Interrupted, stop_requests
from mwpb_fast.system.threads import adaptive_openmp_waits

FILLED = "FILE.py:NAME --weights {} --recipe {}"
UNFIT = f"; are they another model's? --model.name names those built in, and {FILLED} takes code"


def evaluate_run(request: Request, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Attack what is asked for and return the result, see `evaluate`.

    The result goes to evaluation-<which>.json in the run folder, beside the file for a file, a preview not in the
    place of a result on the whole test set, see `write_result`; finished shards are kept in the folder of the same
    name, and the same call goes on from them. tell: takes the lines that say what was written. Raises ConfigError,
    DataError and CheckpointError for what the user can mend, and Interrupted after SIGTERM or SIGINT.
    """
    subject = Subject(request)
    result = subject.attack()
    subject.write(subject.results, result, tell)
    return result


class Subject:
    """What a request is about, loaded: its model, test split, configuration and precision.

    config: of the run that wrote the file, or the request's; there is none where the request names images.
    evaluation: the request's, or the configuration's. results: where they are kept, see `evaluate`'s folder.
    about: the entries of a result that say what it is of. doubts: what makes it doubtful, as under its "warnings".
    """

    def __init__(self, request: Request) -> None:
        self.request, self.results = request, result_path(request.target, request.which, weights=request.weights)
        self.doubts: dict[str, Any] = {}
        self.images: TestSet
        self.model: Model
        keep_freed_memory()
        if is_name(request.target):
            self._take_named(request)
        else:
            self._take_file(request)

    def _take_named(self, request: Request) -> None:
        name, config = str(request.target), request.config
        if config is None and not request.images:
            raise ConfigError(f"{name}: say which images it is for: --images module:name, or --recipe RECIPE")
        self.evaluation = request.evaluation or (config.evaluation if config else EvaluationConfig())
        self._take_precision(request, config.precision if config else PrecisionConfig())
        named = named_model(name, request.weights)
        self.model, self.doubts = named.model, named.doubts
        if isinstance(self.model, torch.nn.Module):
            self.model.to(self.precision.device)
        self.about = named.about | {"split": "test"}
        if request.images:
            self.images = find(request.images)
            self.about |= {"data": request.images}
        elif config:
            self.config, split = config, data.load_split(_where(request, config), "test")
            self.images = split
            self.about |= {"data": config.data.name, "split_sha256": split.sha256}

    def _take_precision(self, request: Request, own: PrecisionConfig) -> None:
        for name in self.evaluation.attacks:
            find_attack(name)
        asked = own if request.device is None else replace(own, device=request.device)
        # not tuned: an attack goes on with fewer and fewer images, and cuDNN would measure for each number of them
        self.precision = make_precision(replace(asked, dtype="fp32", attack_dtype="auto", tune=False))

    def _take_file(self, request: Request) -> None:
        path, state = read_weights(request.target, request.which)
        own = own_config(path, state)
        config = own or request.config
        if config is None:
            raise checkpoint.CheckpointError(
                f"{path}: holds weights only; say which model and data set they are for: --recipe table1.at "
                f"--model.name resnet-18, or for code {FILLED.format(path, 'table1.at')}"
            )
        self.config, self.about = config, _origin(request, path, state, own)
        self.evaluation = request.evaluation or config.evaluation
        self._take_precision(request, config.precision)
        where = _where(request, config)
        images = self.images = data.load_split(where, "test")
        normalize = state["normalize"] if own else None
        if not own and config.model.normalize:
            train = data.load_split(where, "train")
            normalize = train.statistics(data.split_indices(train.labels, where)[0])
        trained, mine = data.identity_of(state if own else {}), data.identity(images)
        if other := data.difference(trained, {key: mine[key] for key in data.KIND}):
            raise ConfigError(f"{images.origin}: not the data of the checkpoint, which has {other}")
        try:
            model = build_model(
                config.model.name, num_classes=images.num_classes, channels=images.channels, normalize=normalize
            )
            if own:
                load_weights(model, state.get("ema") or state["model"])
            else:
                loaded = load_weights(model, state, request.weights)
                normalize = loaded.normalize or normalize
                self.about["weights"] = str(loaded)
                if loaded.doubt:
                    self.doubts["normalisation"] = {"message": loaded.doubt, "shards": []}
        except (
            ValueError,
            TypeError,
            AttributeError,
            ImportError,
            LookupError,
        ) as error:  # of the user's own code
            hint = "" if own or "do not fit the model" not in str(error) else UNFIT.format(path, config.recipe)
            raise checkpoint.CheckpointError(f"{path.name}: {error}{hint}") from error
        model.to(self.precision.device).to(memory_format=self.precision.memory_format).eval()  # type: ignore[call-overload]
        if self._takes_layout(model, images):
            self.precision = replace(self.precision, memory_format=self._layout(model, images))
        self.model = model
        self.about |= {"model": config.model.name, "data": config.data.name, "split": "test"}
        self.about["model_config"] = asdict(config.model)
        self.about["normalize"] = normalize and [list(values) for values in normalize]
        self.about["split_sha256"] = images.sha256

    def _takes_layout(self, model: torch.nn.Module, images: data.Images) -> bool:
        """Whether the model runs in its precision's layout. One that cannot take channels-last images gets others:
        its weights are made contiguous, and the session finds that out, or says what else is wrong with it."""
        x = torch.zeros(2, *images.images.shape[1:], device=self.precision.device)
        try:
            with torch.no_grad():
                model(x.clone(memory_format=self.precision.memory_format))
        except Exception:  # the model's own code, which may raise anything
            channels_last_is_why(model, x, self.precision)
            return False
        return True

    def _layout(self, model: torch.nn.Module, images: data.Images) -> torch.memory_format:
        """That of its precision; on CUDA whichever is faster."""
        device, asked = self.precision.device, self.precision.memory_format
        if device.type != "cuda" or asked != torch.channels_last:
            return asked
        size = min(self.evaluation.batch_size, len(images))
        return faster_layout(model, next(data.eval_batches(images, device, size, torch.arange(size))).x)

    def attack(self, probes: dict[str, EvaluationAttack] | None = None) -> dict[str, Any]:
        """The result of its evaluation, and of the probes."""
        with adaptive_openmp_waits(), stop_requests() as request:

            def tick() -> None:
                if request.number:
                    raise Interrupted(request.number)

            session, show = self.session(probes), self.request.show
            result = attack_all(session, show=show, tick=tick, start_helpers=self._start_helpers)
        result["warnings"] = self.doubts | result["warnings"]
        return {"format": result["format"]} | self.about | result

    def session(self, probes: dict[str, EvaluationAttack] | None = None) -> Session:
        """Its model and images, checked."""
        request, model, precision = self.request, self.model, self.precision
        return Session(
            model, self.images, self.evaluation, precision, self.results, request.seed, probes, request.save_images
        )

    def write(self, path: Path, result: dict[str, Any], tell: Callable[[str], None]) -> Path:
        """Keep its result, see `write_result`. An earlier one about code or a file from elsewhere is not lost: it
        may be of any model and setting, while a run's says what the run is."""
        stem = place(path, result)
        if "recipe" not in self.about and (line := keep_earlier(stem, result)):
            tell(line)
        write_result(path, result)
        tell(f"written: {stem}.json")
        return stem

    @contextlib.contextmanager
    def _start_helpers(self, unfinished: int) -> Iterator[Helpers]:
        threads, wanted = torch.get_num_threads(), self.request.processes
        hands = min(threads, len(os.sched_getaffinity(0)), unfinished) if wanted is None else wanted
        launched = ranks.launched() > 1  # then these processes are what shares the work
        if launched or self.precision.device.type != "cpu" or min(hands, unfinished) < 2:
            yield Helpers()
            return
        shares = [pickle.dumps((self.request, part, hands)).hex() for part in range(1, hands)]
        each = max(1, threads // hands)
        torch.set_num_threads(each)
        try:
            code = f"from {__name__} import help_parent; help_parent()"
            with helper_processes(code, shares, each) as helpers:
                yield helpers
        finally:
            torch.set_num_threads(threads)


def _where(request: Request, config: Config) -> Any:
    return config.data if request.data_dir is None else replace(config.data, dir=str(request.data_dir))


def help_parent() -> None:
    """What a helper process of `evaluate_run` does: the share that its first argument says."""
    request, part, parts = pickle.loads(bytes.fromhex(sys.argv[1]))
    parent = int(sys.argv[2])

    def tick() -> None:
        if orphaned(parent):
            raise SystemExit(1)

    attack_share(Subject(request).session(), part, parts, tick)


def result_path(target: Path, which: str, kind: str = "evaluation", weights: str = "") -> Path:
    """Where a result of that kind about a run's best or last checkpoint, or a file, is kept; less its suffix. That
    of a model in code is kept in the current folder, with the name of the file that its `weights` are from."""
    if is_name(target):
        place, _, name = str(target).rpartition(":")
        place = Path(place).stem if place.endswith(".py") else place
        return Path(f"{kind}-{place}.{name}{f'-{split(weights)[0].stem}' * bool(weights)}")
    return target / f"{kind}-{which}" if target.is_dir() else target.parent / f"{kind}-{target.stem}"


def read_weights(target: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """The newest undamaged best or last checkpoint of a run's folder, or the file that `target` is, see
    `read_file`: path, content. Raises CheckpointError."""
    if target.is_dir():
        found = checkpoint.read_newest(target / "checkpoints", which)
        if found is None:
            raise checkpoint.CheckpointError(f"{target}: no {which} checkpoint in it; train it first")
        return found
    return target, read_file(target)


def own_config(path: Path, state: dict[str, Any]) -> Config | None:
    """The configuration of the run that wrote a checkpoint; None for bare weights. Raises ConfigError."""
    try:
        return from_dict(state["config"]) if checkpoint.is_ours(state) else None
    except (ConfigError, checkpoint.CheckpointError) as error:
        raise ConfigError(f"{path}: {error}") from error


def finished_epoch(state: dict[str, Any]) -> int:
    """The epoch that a checkpoint's weights are from. One that a run goes on from, known by its "batch", names the
    epoch in which it does: the next one where no batch of it is done."""
    return int(state["epoch"]) - (state.get("batch") == 0)


def _origin(request: Request, path: Path, state: dict[str, Any], own: Config | None) -> dict[str, Any]:
    about: dict[str, Any] = {"checkpoint": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if own:
        text = json.dumps(state["config"], sort_keys=True)
        about |= {"recipe": own.recipe, "epoch": finished_epoch(state)}
        about |= {"which": request.which if request.target.is_dir() else None}
        about |= {"config_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return about
