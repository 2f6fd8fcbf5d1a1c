"""What was chosen, and why: the content of engine.json."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mwpb_fast.choice.candidates import Candidate, read_candidate
from mwpb_fast.config import ConfigError

MARGIN = 0.9  # a candidate is clearly faster with at most this share of another one's time; below that it is noise


@dataclass
class Tried:
    """A candidate, its ledger, its time, and why it was refused, if it was."""

    candidate: Candidate
    ledger: dict[str, float] = field(default_factory=dict)
    milliseconds: float | None = None
    refused: str = ""

    def plain(self) -> dict[str, Any]:
        """In plain types."""
        own = {"ledger": self.ledger, "milliseconds": self.milliseconds, "refused": self.refused}
        return {"name": str(self.candidate), **dataclasses.asdict(self.candidate), **own}


@dataclass
class Record:
    """chosen: what the run goes on with. how: by an option, by rule, by a trial, from the cache, or by a pin. why:
    a line. tried: by order of preference. timed: what the milliseconds are of. fallbacks: what went wrong since.
    seconds: that the trial took. share: of the time of the run's steps, as the trial's times have it.
    circumstances: what the choice depends on. layers: the twin's, as `tune` records them."""

    chosen: Candidate
    how: str
    why: str
    tried: list[Tried] = field(default_factory=list)
    timed: str = ""
    fallbacks: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    share: float = 0.0
    circumstances: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def proven(self) -> bool:
        """Whether it was chosen for its figures, so that these are looked at again from time to time."""
        return self.how in ("trial", "cache", "pin")

    def plain(self) -> dict[str, Any]:
        """In plain types, as `read_record` takes them."""
        found = copy.deepcopy({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        chosen = {"name": str(self.chosen), **dataclasses.asdict(self.chosen)}
        return found | {"chosen": chosen, "tried": [tried.plain() for tried in self.tried]}

    def next(self) -> list[Candidate]:
        """What passed besides the chosen one, the fastest first."""
        left = [t for t in self.tried if not t.refused and t.candidate != self.chosen]
        left.sort(key=lambda t: float("inf") if t.milliseconds is None else t.milliseconds)
        return [t.candidate for t in left]

    def refuse(self, candidate: Candidate, reason: str, fault: str) -> None:
        """Take it no more, nor what shares its fault."""
        if candidate not in (t.candidate for t in self.tried):
            self.tried.append(Tried(candidate))
        for t in self.tried:
            if t.candidate.shares(candidate, fault):
                t.refused = t.refused or reason


def fastest(tried: list[Tried], margin: float = MARGIN) -> Tried | None:
    """The first, in order of preference, than which none is clearly faster, as MARGIN has it; None where all are
    refused."""
    passed = [t for t in tried if not t.refused]
    times = [t.milliseconds for t in passed if t.milliseconds is not None]
    for t in passed:
        if not times or (t.milliseconds is not None and min(times) >= margin * t.milliseconds):
            return t
    return None


def read_record(values: Any) -> Record:
    """The record that `plain` wrote. Raises ValueError, a line, for anything else."""
    if not isinstance(values, Mapping) or "chosen" not in values:
        raise ValueError("it says nothing of an engine that was chosen")
    try:
        tried = [
            Tried(read_candidate(t), dict(t["ledger"]), t["milliseconds"], str(t["refused"]))
            for t in values.get("tried", [])
        ]
        return Record(
            chosen=read_candidate(values["chosen"]),
            how=str(values.get("how", "")),
            why=str(values.get("why", "")),
            tried=tried,
            timed=str(values.get("timed", "")),
            fallbacks=list(values.get("fallbacks", [])),
            seconds=float(values.get("seconds", 0.0)),
            share=float(values.get("share", 0.0)),
            circumstances=dict(values.get("circumstances", {})),
            layers=list(values.get("layers", [])),
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not the record of a choice ({type(error).__name__}: {error})") from error


def read_pin(path: Path) -> Record:
    """The record in another run's engine.json. Raises ConfigError, a line."""
    try:
        return read_record(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"precision.pin: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"precision.pin: {path}: not an engine.json: {error}") from error
