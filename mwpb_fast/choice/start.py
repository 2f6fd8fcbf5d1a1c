"""The engine of a run that is begun: what is pinned, else what an earlier start chose, else what a trial shows."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch

from mwpb_fast.choice import cache
from mwpb_fast.choice.candidates import Candidate, candidates, graphs, trainings
from mwpb_fast.choice.circumstances import circumstances
from mwpb_fast.choice.engine import Engine
from mwpb_fast.choice.ledger import Ledger, operations
from mwpb_fast.choice.record import Record, Tried, read_record
from mwpb_fast.choice.trial import GRADIENT, LATE, Trial
from mwpb_fast.config import ConfigError
from mwpb_fast.engine.parallel import apart
from mwpb_fast.method import Net
from mwpb_fast.runs.log import note
from mwpb_fast.system import ranks

LIMIT, TUNED = 10.0, 30.0  # seconds of a trial, without and with the tuning of layers
WORTH = 20  # a run must be expected to take so many times that limit, or there is no trial: it costs 5 % at most
RATE = {"cpu": 2e11, "cuda": 5e13}  # operations a second, for what a run is expected to take
PASSES = 24  # forward passes of a step of ten attack steps
LAUNCHES = {"cpu": 0.0, "cuda": 0.01}  # seconds that the smallest step takes
SMALL = {"cpu": 0.05, "cuda": 0.0}  # seconds; a shorter step is not spent in what the candidates differ in


def choose(engine: Engine, epoch: int, key: torch.Tensor, quiet: bool) -> None:
    """Let `engine`, of a run that begins with `epoch` and its `key`, take what is right and fast; record why. Of
    several processes rank 0 chooses, on its part of the first batch, and all take the same."""
    if ranks.count() == 1:
        return _choose(engine, epoch, key, quiet)

    def work() -> dict[str, Any]:
        with apart(engine.step.model):
            _choose(engine, epoch, key, quiet)
        return engine.record.plain()

    found, wrong = read_record(ranks.led(work)), ""
    if not ranks.leads():
        try:
            engine.follow(found, found.how, found.why)
        except ConfigError as error:
            engine.record, wrong = found, str(error)
    engine.share(wrong, epoch)


def _choose(engine: Engine, epoch: int, key: torch.Tensor, quiet: bool) -> None:
    first, last = candidates(engine.config, engine.precision)
    more = trainings(engine.config, engine.precision.device)
    if len(first) + len(more) > 1 and not engine.record.proven:
        if reason := not_worth(engine):
            engine.record.why = reason
            if engine.record.chosen.tuned and not engine.record.layers:
                engine.take(engine.record.chosen, engine.record.layers)
        elif not _remembered(engine, [replace(c, training=t) for c in first + last for t in (c.training, *more)]):
            _try_all(engine, first, last, more, epoch, key)
    if engine.record.proven and not quiet:
        print(f"engine: {engine.record.chosen}: {engine.record.why}", flush=True)
    engine.write()


def not_worth(engine: Engine) -> str:
    """Why a trial would not pay for this run; empty where it may. It is judged by how much there is to compute,
    not by the clock, so that two starts of a run agree."""
    steps, kind = engine.config.epochs * len(engine.loader), engine.precision.device.type
    computing = PASSES * len(engine.sample) * operations(engine.model, engine.sample) / RATE[kind]
    expected = steps * max(LAUNCHES[kind], computing)
    if expected < WORTH * _limit(engine):
        return f"by rule: too short for a trial, with {steps} steps in about {expected:.0f} s"
    return "" if computing >= SMALL[kind] else "by rule: too small a model for a trial"


def _limit(engine: Engine) -> float:
    return TUNED if engine.config.precision.tune else LIMIT


def _remembered(engine: Engine, allowed: list[Candidate]) -> bool:
    """Whether an earlier start's choice is taken."""
    found = cache.read(_circumstances(engine))
    if found is None or found.chosen not in allowed:
        return False
    try:
        engine.follow(found, "cache", f"as an earlier start found: {found.why}")
    except ConfigError as error:
        note(f"engine: what an earlier start found fails now: {error}; a trial is made")
        return False
    return True


def _circumstances(engine: Engine) -> dict[str, Any]:
    return circumstances(engine.config, engine.precision, engine.sample, engine.gathers)


def _try_all(
    engine: Engine,
    first: list[Candidate],
    last: list[Candidate],
    more: tuple[str, ...],
    epoch: int,
    key: torch.Tensor,
) -> None:
    started, layers = time.monotonic(), dict[Candidate, list[dict[str, Any]]]()

    def make(candidate: Candidate) -> Net:
        # without graphs the layers are those of the net that is taken: to measure each net's would cost the budget
        net, layers[candidate] = engine.build(candidate, tuned=graphs(engine.precision.device))
        return net

    inputs = engine.inputs(epoch, 0, key, engine.method.in_epoch(epoch))
    ledger = engine.ledger(inputs) if engine.judged else None
    trial = Trial(engine.step, inputs, make, engine.capture, ledger, _limit(engine))
    trial.trained, trial.passes = engine.trained, engine.pass_ledger(inputs) if more else None
    with engine.precision.mode():
        tried, best, timed = trial.run(first, last, more)
    for t in tried:
        if t.refused:
            note(f"engine: {t.candidate}: {t.refused}")
    if best is None:
        engine.record.tried, engine.record.why = tried, "by rule: nothing passed its trial"
        note(f"engine: nothing passed its trial; {engine.record.chosen} goes on")
        return
    found = Record(best.candidate, "trial", "", tried, timed, circumstances=_circumstances(engine))
    # none where the net was made for a candidate without any
    found.layers = layers.get(replace(best.candidate, training=first[0].training), [])
    engine.follow(found, "trial", "")
    if engine.record.layers and not found.layers:  # measured only now, so the ledger has not seen them
        found.layers = engine.record.layers
        engine.look_again(epoch, key, inputs.method)
    taken = time.monotonic() - started
    share = taken / _expected(engine, best, ledger if timed == GRADIENT else None)
    for record in (found, engine.record):
        record.seconds, record.share, record.why = taken, share, _why(best, tried, taken, share)
    late = any(t.refused == LATE for t in tried)
    kept = engine.record.chosen == found.chosen
    if kept and (
        not late or sum(t.milliseconds is not None for t in tried) > 1
    ):  # else another start may come farther
        cache.write(found)


def _expected(engine: Engine, best: Tried, ledger: Ledger | None) -> float:
    """Seconds of the run's steps by the time of the one that is taken; without end where it was not timed. ledger:
    whose images' gradient was timed, in place of a step; all passes then count as those of the attack."""
    seconds = float("inf") if best.milliseconds is None else 1e-3 * best.milliseconds
    if ledger is not None:
        seconds *= PASSES / 2 * len(engine.sample) / len(ledger.batch.x)
    return max(1e-9, seconds * engine.config.epochs * len(engine.loader))


def _why(best: Tried, tried: list[Tried], taken: float, share: float) -> str:
    passed = [t for t in tried if not t.refused]
    shares = [
        f"; {best.milliseconds / t.milliseconds:.2f} of {t.candidate}'s time"
        for t in passed
        if t is not best and t.milliseconds and best.milliseconds
    ]
    spent = f"in {taken:.1f} s" + (f", at most {math.ceil(1e4 * share) / 1e4:.2%} of the run" if share else "")
    return f"best of {len(passed)} that passed of {len(tried)}, {spent}{''.join(shares)}"
