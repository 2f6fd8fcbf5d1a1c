"""What has to be run for a table: a configuration for each row and seed, its folder, and how far it is.

A run is known by its configuration, not by the table that wants it: rows with the same recipe share one, in
`OUT/runs/<what it is>-<hash>/seed<N>`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwpb_fast import options
from mwpb_fast.config import AXES, Config, ConfigError, EvaluationConfig, axis_name, from_dict
from mwpb_fast.config.dependence import FREE, dependence
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.reproduce.layout import Row, Table
from mwpb_fast.runs.log import read_records

TOLD = {"evaluation.attacks", "evaluation.step_size", "evaluation.subset", "evaluation.costly_subset"}


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run of a row. start: its recipe, on the table's test images. evaluations: checkpoint (best or last), how
    it is attacked."""

    row: Row
    config: Config
    start: Config
    folder: Path
    evaluations: tuple[tuple[str, EvaluationConfig], ...]

    @property
    def name(self) -> str:
        """The row and the seed, for messages."""
        return f"{self.config.recipe} seed {self.config.seed}"

    def foreign(self) -> bool:
        """Whether the folder holds another run, or one whose configuration cannot be read."""
        try:
            content = (self.folder / "config.yaml").read_bytes()
        except FileNotFoundError:
            return False
        return _saved_identity(content) != identity(self.config)

    def trained(self) -> bool:
        """Whether the run has come to its end. Raises ConfigError where the folder holds another run."""
        if self.foreign():
            raise ConfigError(f"{self.folder} holds a run with other settings; remove it, or take another --out")
        return (self.folder / "radii.json").exists()  # the last thing that training writes

    def missing(self) -> list[tuple[str, EvaluationConfig]]:
        """The evaluations that have attacks without a result."""
        results = read_results(self.folder)
        return [
            (which, evaluation)
            for which, evaluation in self.evaluations
            if any(result_key(name, evaluation) not in results.get(which, {}) for name in evaluation.attacks)
        ]

    def state(self) -> str:
        """How far the run is, in words."""
        try:
            if self.trained():
                missing = [which for which, _ in self.missing()]
                return f"trained, to be evaluated: {', '.join(dict.fromkeys(missing))}" if missing else "done"
        except ConfigError as error:
            return str(error)
        records = read_records(self.folder / "metrics.jsonl")
        if records:
            return f"after epoch {records[-1]['epoch']} of {self.config.epochs}"
        return "begun" if (self.folder / "config.yaml").exists() else "to be run"


def plan_runs(
    table: Table,
    rows: Sequence[str],
    seeds: int,
    out: Path,
    overrides: Sequence[str],
    *,
    epochs: int = 0,
    last: str = "",
    long_subset: int = 0,
) -> list[PlannedRun]:
    """The runs of a table: every row with the first seed, then with the next, so that early ones compare.

    rows: names, none for all. seeds: how many, counted from the configuration's own. overrides: words
    `--name=value` as `train` takes them, for every row. epochs: scale the schedule to so many, 0 for the
    recipe's. last, long_subset: in place of the table's. Raises ConfigError and DataError.
    """
    runs = []
    for row in dict.fromkeys(table.row(name) for name in rows) or table.rows:
        name = f"{table.name}.{row.name}"
        start = options.find_recipe(name)
        images = table.test_subset or start.evaluation.subset
        start = dataclasses.replace(start, evaluation=dataclasses.replace(start.evaluation, subset=images))
        try:
            config = options.configure(name, {}, overrides)
            schedule_words = _scaled(start, config, epochs, overrides)
            config = options.configure(name, {}, [f"--evaluation.subset={images}", *schedule_words, *overrides])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        folder = out / "runs" / f"{_title(config)}-{identity(config)}"
        evaluations = _evaluations(config.evaluation, last or table.last, long_subset or table.long_subset)
        for seed in range(config.seed, config.seed + seeds):
            run = PlannedRun(
                row=row,
                config=dataclasses.replace(config, seed=seed),
                start=start,
                folder=folder / f"seed{seed}",
                evaluations=evaluations,
            )
            runs.append(run)
    return sorted(runs, key=lambda run: run.config.seed)


def schedule(start: Config, epochs: int, chosen: Config | None = None) -> dict[str, Any]:
    """The schedule of `start` laid over so many epochs: option -> value.

    Warm-up, drops of the learning rate and the axes' own numbers of epochs (options whose names end in `_epochs`)
    are scaled in proportion and rounded half up; but the warm-up keeps an epoch and leaves one where there are
    two, the first epoch has the full learning rate, and drops stay an epoch apart. chosen: the configuration whose
    axes are taken, if not start's own; what a module not of `start` has is made for the paper's number of epochs,
    which is `Config`'s default.
    """

    def scaled(epoch: int, whole: int = start.epochs) -> int:
        return int(epoch * (epochs / whole) + 0.5)

    result: dict[str, Any] = {"epochs": epochs}
    if start.warmup_epochs:
        result["warmup_epochs"] = min(max(1, scaled(start.warmup_epochs)), epochs - 1)
    drops: list[int] = []
    for drop in start.optim.drops:
        drops.append(max(scaled(drop), drops[-1] + 1 if drops else 2))
    result["optim.drops"] = drops
    for axis in AXES:
        value = getattr(chosen or start, axis)
        whole = start.epochs if type(value) is type(getattr(start, axis)) else Config.epochs
        for field in dataclasses.fields(value):
            if field.name.endswith("_epochs") and getattr(value, field.name):
                result[f"{axis}.{field.name}"] = max(1, scaled(getattr(value, field.name), whole))
    return result


def _scaled(start: Config, chosen: Config, epochs: int, overrides: Sequence[str]) -> list[str]:
    """The words for a schedule over so many epochs (0: the recipe's), less what the overrides set themselves."""
    if epochs < 0:
        raise ConfigError(f"--epochs must be at least 1, not {epochs}")
    given = {word.removeprefix("--").partition("=")[0] for word in overrides}
    groups = given - set(AXES)  # `--objective mail` names a module and says nothing of its numbers
    values = schedule(start, epochs or start.epochs, chosen)
    return [f"--{k}={v}" for k, v in values.items() if k not in given and k.partition(".")[0] not in groups]


def _evaluations(
    config: EvaluationConfig, last: str, long_subset: int
) -> tuple[tuple[str, EvaluationConfig], ...]:
    long = [name for name in config.attacks if find_attack(name).long]
    cheap = [name for name in config.attacks if name not in long]
    together = long_subset in (0, config.subset) or 0 < config.subset < long_subset
    found = []
    for which in ("best", "last"):
        if which == "last" and last == "cheap":
            groups = [(cheap, config.subset)]
        elif together:
            groups = [(list(config.attacks), config.subset)]
        else:
            groups = [(cheap, config.subset), (long, long_subset)]
        found += [(which, dataclasses.replace(config, attacks=tuple(a), subset=n)) for a, n in groups if a]
    return tuple(found)


def identity(config: Config) -> str:
    """What training depends on, seed apart, as ten hexadecimal digits; the seed has its own folder."""
    content = dependence(config, FREE | {"seed"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


@functools.cache
def _saved_identity(content: bytes) -> str:
    """The identity of a run from its config.yaml; empty for one that cannot be read."""
    import yaml

    try:
        return identity(from_dict(yaml.safe_load(content)))
    except (ConfigError, yaml.YAMLError, TypeError, ValueError):
        return ""


def _title(config: Config) -> str:
    axes = [axis_name(AXES[name], getattr(config, name)) for name in ("budget", "objective", "perturbation")]
    return "-".join([config.data.name, config.model.name, *axes])


def changes(runs: Sequence[PlannedRun]) -> list[str]:
    """In what the runs depart from their recipes, as `epochs 4 instead of 110`; with the rows where not all do."""
    found: dict[str, list[str]] = {}
    rows = {run.row.name: run for run in runs}
    for name, run in rows.items():
        before = dict(options.values_of(run.start))
        for key, value in options.values_of(run.config):
            if key not in FREE - TOLD | {"seed"} and (key not in before or before[key] != value):
                text = f"{key} {_told(key, value)}"
                if key in before:
                    text += f" instead of {_told(key, before[key])}"
                found.setdefault(text, []).append(name)
    return [text if len(names) == len(rows) else f"{text} ({', '.join(names)})" for text, names in found.items()]


def _told(key: str, value: Any) -> str:
    return "all" if key.endswith("subset") and not value else options.show(value)


def result_key(attack: str, evaluation: EvaluationConfig) -> str:
    """Under which an attack's result is kept in a run's results.json."""
    images = test_images(attack, evaluation) or "all"
    return f"{attack} eps={evaluation.eps} step={evaluation.step_size} images={images}"


def test_images(attack: str, evaluation: EvaluationConfig) -> int:
    """How many test images an attack is run on, 0 for all; see EvaluationConfig for the costly ones."""
    limits = [evaluation.subset, evaluation.costly_subset if find_attack(attack).costly else 0]
    return min((limit for limit in limits if limit), default=0)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """results.json of a run folder: checkpoint (best, last) -> result_key -> result; empty where it is none."""
    try:
        content = json.loads((folder / "results.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
