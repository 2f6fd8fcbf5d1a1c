"""An attack over many images, in shards of at most 250 whose results are files there whole or not at all.

A killed evaluation goes on from the shards that are there, and several processes, also of machines that share the
folder, can share the work, since a shard's result depends on nothing but its key and number. Each shard is claimed
by the one that attacks it; the system takes back what a dead process had claimed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch

from mwpb_fast.evaluation.adversaries import write_shard
from mwpb_fast.evaluation.contract import AttackSetting, EvaluationAttack, Outcome
from mwpb_fast.evaluation.course import Counter, Course
from mwpb_fast.evaluation.function import Fingerprint, same
from mwpb_fast.evaluation.watched import Watched
from mwpb_fast.system.files import is_whole, sealed, to_json, write_atomically
from mwpb_fast.system.lock import Claim, claims

SHARD = 250
Report = Callable[[int, str], None]


def split(index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The shards of (n,) image numbers: as few as hold at most 250 each, and even."""
    return torch.tensor_split(index, max(1, math.ceil(len(index) / SHARD)))


@dataclass
class ShardedAttack:
    """One attack on the images numbered `index`.

    name: its stem in file names. setting: with the attack's own values in it. load: from image numbers to x
    (n, C, H, W) float32 in [0, 1] and y (n,) on the device. key: whatever results depend on besides the attack and
    the setting; a file with another key is not taken. fingerprint: of the model's function; a file with another
    one is not taken either. folder None: nothing is kept. keep_images: whether the images that it makes are, too.
    engine: what it searches on, where that may be something other than the model.
    """

    name: str
    attack: EvaluationAttack
    index: torch.Tensor
    load: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    setting: AttackSetting
    folder: Path | None
    key: dict[str, Any]
    fingerprint: Fingerprint
    keep_images: bool = False
    engine: str = ""

    def __post_init__(self) -> None:
        setting = self.setting
        self.shards = split(self.index)
        key = self.key | {
            "attack": self.name,
            "parameters": self.attack.parameters,
            "eps": str(setting.eps) if self.attack.ball else None,
            "step_size": str(setting.step_size) if self.attack.stepped else None,
            "norm": setting.norm,
            "seed": setting.seed,
            "batch_size": setting.batch_size,
            "dtype": str(setting.precision.dtype),
        }
        key |= {"engine": self.engine} if self.engine else {}
        self.digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.records: dict[int, dict[str, Any]] = {}

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the shards that have no result yet."""
        return [number for number in range(len(self.shards)) if self.read(number) is None]

    def run(self, model: Watched, shards: Iterable[int], report: Report = lambda images, part: None) -> None:
        """Attack those of `shards` that have no result. report: called with the number of images newly done, and
        the part of the attack that is at work, if it has several."""
        counters = {number: Counter(len(self.shards[number]), report) for number in shards}
        with self._claims(model.tick) as claim:
            while counters:
                taken = [number for number in counters if self._run(model, number, counters[number], claim)]
                counters = {number: counter for number, counter in counters.items() if number not in taken}
                if not taken:  # all that is left is being attacked by others
                    model.tick()
                    time.sleep(0.2)

    def _run(self, model: Watched, number: int, counter: Counter, claim: Claim) -> bool:
        """Whether a shard has a result now; it has none where another process is at it."""
        if self.read(number) is None:
            with claim(number) as mine:
                if not mine:
                    return False
                if self.read(number) is None:
                    attack = partial(self._attack, model, self.shards[number], counter)
                    self.write(number, *model.with_room(attack))
        counter.reach(1.0)
        return True

    def _claims(self, tick: Callable[[], None]) -> AbstractContextManager[Claim]:
        """What claims a shard by its number."""
        if self.folder is None or not self.unfinished:
            return contextlib.nullcontext(lambda number: contextlib.nullcontext(True))
        tick()  # who is to stop leaves no trace
        self.folder.mkdir(parents=True, exist_ok=True)
        return claims(self.folder / f"{self.name}-{self.digest[:12]}.lock")

    def _attack(self, model: Watched, index: torch.Tensor, counter: Counter) -> tuple[Outcome, dict[str, Any]]:
        before, tick = model.forwards, model.tick
        course = model.course = Course(self.attack.forwards * len(index), before)
        model.not_finite.zero_()
        refuted = model.search.refuted if model.search else 0

        def count() -> None:
            tick()
            counter.reach(course.share(model.forwards), course.part)

        began, started = time.time(), time.monotonic()
        x, y = self.load(index)
        model.tick = count
        try:
            # so that a randomised model, too, gives this shard the same numbers again
            with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
                torch.manual_seed(ops.derive_seed(self.setting.seed, int(index[0])))
                outcome = self.attack.run(model, x, y, index.to(x.device), self.setting)
        finally:
            model.tick = tick
        logits, gradients = model.not_finite.tolist()
        return outcome, {
            "began": began,
            "seconds": round(time.monotonic() - started, 3),
            "forwards": model.forwards - before,
            **({"refuted": model.search.refuted - refuted} if self.engine and model.search else {}),
            "not_finite": {"logits": logits, "gradients": gradients},
        }

    @property
    def images(self) -> Path | None:
        """Where all its images are kept once every shard is done; None where they are not, or there are none."""
        kept = self.keep_images and self.attack.ball
        return self.folder / f"{self.name}-{self.digest[:12]}.safetensors" if kept and self.folder else None

    # shard files ----------------------------------------------------------------------------------------------
    def path(self, shard: int) -> Path | None:
        """Where the result of a shard is kept."""
        return self.folder and self.folder / f"{self.name}-{self.digest[:12]}-{shard:05d}.json"

    def images_path(self, shard: int) -> Path:
        """Where the images of a shard are kept until all are there."""
        assert self.folder is not None
        return self.folder / f"{self.name}-{self.digest[:12]}-{shard:05d}.safetensors"

    def write(self, shard: int, outcome: Outcome, about: dict[str, Any]) -> None:
        """Keep a shard's result, with what is known about its making: when it began (seconds since 1970) and the
        time that it took; the number of images sent through the model, and how many of them gave logits and
        gradients that are not finite."""
        record = {
            "key": self.digest,
            "fingerprint": self.fingerprint,
            "shard": shard,
            "flags": bits(outcome.correct),
            "after": {name: bits(flags) for name, flags in outcome.after.items()},
            "warnings": outcome.warnings,
            "deviations": list(outcome.deviations),
            "values": {name: numbers.tolist() for name, numbers in outcome.values.items()},
            "stages": {name: round(seconds, 3) for name, seconds in outcome.seconds.items()},
            "predicted": None if outcome.predicted is None else outcome.predicted.tolist(),
            **about,
        }
        # as it is read back: JSON has no NaN
        text, path = to_json(sealed(record)), self.path(shard)
        self.records[shard] = read = json.loads(text)
        read.pop("sha256")
        if self.images and outcome.x_adv is not None:
            write_shard(self.images_path(shard), outcome.x_adv)
        if path is not None:
            write_atomically(path, text.encode())

    def read(self, shard: int) -> dict[str, Any] | None:
        """The result of a shard, or None where there is none that can be used."""
        path, count = self.path(shard), len(self.shards[shard])
        if shard in self.records or path is None:
            return self.records.get(shard)
        if self.images and not (self.images.exists() or self.images_path(shard).exists()):
            return None
        try:
            record = json.loads(path.read_bytes())
            flags = [record["flags"], *record["after"].values()]
            fits = (
                is_whole(record)
                and record["key"] == self.digest
                and same(record["fingerprint"], self.fingerprint)
                and record["shard"] == shard
                and all(len(text) == count and set(text) <= {"0", "1"} for text in flags)
                and all(len(numbers) == count for numbers in record["values"].values())
                and len(record.setdefault("predicted", None) or flags[0]) == count
                and not (self.images and record["predicted"] is None)
                and isinstance(record.get("began", 0.0), float)  # earlier versions did not write it
                and isinstance(record["seconds"], float)
                and isinstance(record["forwards"], int)
                and all(isinstance(record["not_finite"][kind], int) for kind in ("logits", "gradients"))
                and isinstance(record["warnings"], dict)
                and isinstance(record["deviations"], list)
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if fits:
            self.records[shard] = record
        return record if fits else None


def bits(flags: torch.Tensor) -> str:
    """(n,) boolean as a string of 0 and 1."""
    return "".join("1" if flag else "0" for flag in flags.tolist())
