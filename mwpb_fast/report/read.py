"""What a run's folder holds, file by file: a part that is missing or damaged is said, and ends nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from mwpb_fast.config import ConfigError, yaml_file
from mwpb_fast.config.changes import changed
from mwpb_fast.runs.found import require_run
from mwpb_fast.runs.log import parse_records
from mwpb_fast.system.units import counted

BAD = (ValueError, KeyError, TypeError, AttributeError, RecursionError, ZeroDivisionError, OverflowError)


@dataclass(frozen=True)
class Attack:
    """One row of a result. ball: its radius and norm as text. images: which of the test images it saw, None for
    the result's all. flags: 0 or 1 for each of them. of: the attacks of a worst case. probe: a measurement of a
    trust report, and no attack."""

    name: str
    accuracy: float
    interval: tuple[float, float]
    flags: str
    ball: str = ""
    seconds: float | None = None
    images: tuple[int, ...] | None = None
    per_class: tuple[float | None, ...] = ()
    deviations: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    probe: bool = False

    @property
    def n(self) -> int:
        return len(self.flags)


@dataclass(frozen=True)
class Result:
    """An evaluation or a trust report. file: its name. stale: it is of another checkpoint than the run has now;
    None where that cannot be told. counts: images of each class, empty where they are not known. verdicts: (check,
    verdict, text) of a trust report. sweep: its attacks at rising radii."""

    file: str
    which: str
    n: int
    eps: Fraction
    norm: str
    preview: bool
    epoch: int | None
    data: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    attacks: dict[str, Attack]
    warnings: dict[str, str]
    notes: tuple[str, ...]
    verdicts: tuple[tuple[str, str, str], ...]
    sweep: tuple[tuple[Fraction, Attack], ...]
    stale: bool | None

    @property
    def worst(self) -> Attack | None:
        return self.attacks.get("worst")


@dataclass
class Run:
    """A run as its files tell it. problems: what is missing or cannot be read, a line each. changed: in what it
    departs from its recipe, None where that is not known. until: when the last record was written, seconds since
    1970. method: the name that it shares with runs of other seeds. colour: of its lines."""

    folder: Path
    label: str
    config: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    changed: list[str] | None = field(default_factory=list)
    until: float | None = None
    method: str = ""
    colour: str = "c0"

    def column(self, name: str) -> list[tuple[float, float]]:
        """(epoch, number) of the records that have it."""
        found = ((record["epoch"], number_in(record.get(name))) for record in self.records)
        return [(float(epoch), value) for epoch, value in found if value is not None]

    def option(self, name: str, default: Any = None) -> Any:
        """A value of the configuration, such as budget.eps; the default where it is not there."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    def count(self, name: str) -> int:
        """A whole number of the configuration, 0 where there is none."""
        value = self.option(name, 0)
        return value if isinstance(value, int) else 0

    @property
    def last_epoch(self) -> int:
        return max((record["epoch"] for record in self.records), default=0)


def number_in(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read(folder: Path) -> Run:
    """The run in `folder`. Raises ConfigError where there is none: all the rest may be missing."""
    require_run(folder)
    path = folder / "config.yaml"
    config = yaml_file.read(path)
    if not isinstance(config, dict) or "recipe" not in config:
        raise ConfigError(f"{path}: names no recipe; is {folder} the folder of a run?")
    run = Run(folder, str(config["recipe"]), config, changed=changed(config))
    run.records, bad = _try(run, folder / "metrics.jsonl", _records, ([], {}))
    if bad:
        run.problems.append(f"metrics.jsonl: left out, as no records: {counted(len(bad), 'line')}")
    run.until = (
        _try(run, folder / "metrics.jsonl", lambda path: path.stat().st_mtime, None) if run.records else None
    )
    run.radii = _try(run, folder / "radii.json", _radii, [])
    run.environment = _try(run, folder / "environment.json", _mapping, {})
    run.engine = _try(run, folder / "engine.json", _mapping, {})
    for kind in ("evaluation", "trust"):
        for which in ("best", "last"):
            for preview in ("", "-preview"):
                path = folder / f"{kind}-{which}{preview}.json"
                if path.exists() and (found := _try(run, path, _result, None)):
                    run.results.append(found)
    return run


def _try(run: Run, path: Path, reader: Callable[[Path], Any], default: Any) -> Any:
    try:
        return reader(path)
    except FileNotFoundError:
        run.problems.append(f"{path.name} is not there yet")
    except OSError as error:
        run.problems.append(f"{path.name}: {error.strerror}")
    except BAD:
        run.problems.append(f"{path.name} is not what a run writes, and is left out")
    return default


def _records(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    path.stat()  # the parser takes a missing file for an empty one
    records, bad = parse_records(path)
    return sorted(records, key=lambda record: int(record["epoch"])), bad


def _mapping(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()).items())


def _radii(path: Path) -> list[float]:
    return [value for entry in json.loads(path.read_bytes())["radii"] if (value := number_in(entry)) is not None]


def _result(path: Path) -> Result:
    found = json.loads(path.read_bytes())
    attacks = {name: _attack(name, entry) for name, entry in found["attacks"].items()}
    sweep = tuple((Fraction(found["attacks"][name]["eps"]), attacks[name]) for name in found.get("sweep", []))
    if "worst" in found:
        together = ", ".join(map(str, found["worst"]["of"]))
        attacks["worst"] = _attack("worst", found["worst"] | {"ball": f"of {together}"})
    which = "last" if "-last" in path.name else "best"
    return Result(
        file=path.name,
        which=which,
        n=int(found["n"]),
        eps=Fraction(found["eps"]),
        norm=str(found["norm"]),
        preview=bool(found["preview"]),
        epoch=int(found["epoch"]) if "epoch" in found else None,
        data=str(found.get("data_sha256", "")),
        classes=tuple(map(str, found.get("classes", []))),
        counts=_counts(found),
        attacks=attacks,
        warnings={str(kind): str(entry["message"]) for kind, entry in found["warnings"].items()},
        notes=tuple(map(str, found.get("notes", []))),
        verdicts=tuple((str(v["check"]), str(v["verdict"]), str(v["text"])) for v in found.get("verdicts", [])),
        sweep=sweep,
        stale=_stale(path.parent, which, found),
    )


def _counts(found: Mapping[str, Any]) -> tuple[int, ...]:
    """By the confusion table of no attack, whose rows are the classes; empty where that leaves an image out."""
    table = found["attacks"].get("natural", {}).get("confusion") or []
    counts = tuple(sum(map(int, row)) for row in table)
    return counts if len(counts) == len(found.get("classes", [])) and sum(counts) == found["n"] else ()


def _attack(name: str, entry: Mapping[str, Any]) -> Attack:
    low, high = entry["interval"]
    flags = str(entry["flags"])
    if not flags or set(flags) - {"0", "1"}:
        raise ValueError("flags are 0 and 1")
    ball = f"{entry['norm']} {entry['eps']}" if "eps" in entry else str(entry.get("ball", ""))
    return Attack(
        name=name,
        accuracy=float(entry["accuracy"]),
        interval=(float(low), float(high)),
        flags=flags,
        ball=ball,
        seconds=number_in(entry.get("seconds")),
        images=tuple(map(int, entry["images"])) if "images" in entry else None,
        per_class=tuple(map(number_in, entry.get("per_class", []))),
        deviations=tuple(map(str, entry.get("deviations", []))),
        of=tuple(map(str, entry.get("of", []))),
        probe="values" in entry and "radius" not in entry["values"],
    )


def _stale(folder: Path, which: str, found: Mapping[str, Any]) -> bool | None:
    """Whether the newest checkpoint's checksum, which stands beside it, is another than the result's."""
    sidecars = sorted((folder / "checkpoints").glob(f"{which}-?????-???????.pt.sha256"))
    if not sidecars or "sha256" not in found:
        return None
    return sidecars[-1].read_text(encoding="ascii").split()[0] != found["sha256"]
