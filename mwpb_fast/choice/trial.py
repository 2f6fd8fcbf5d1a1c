"""Candidates built, held to the ledger, proven and timed on one batch, which leaves no trace in the run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from mwpb_fast.capture import CapturedStep
from mwpb_fast.choice.candidates import Candidate, graphs
from mwpb_fast.choice.ledger import Ledger, breach
from mwpb_fast.choice.pass_ledger import PassLedger
from mwpb_fast.choice.pass_ledger import breach as breach_of_pass
from mwpb_fast.choice.proof import flaw
from mwpb_fast.choice.record import MARGIN, Tried, fastest
from mwpb_fast.choice.untouched import untouched
from mwpb_fast.method import Batch, Method, Net
from mwpb_fast.runs.log import progress
from mwpb_fast.step import Step

STEPS = 20  # that are timed, fewer where they take longer than
SECONDS = 1.0
ROUNDS = 5  # of a gradient each, in turn; the least counts, because a neighbour on the machine only adds
SURE = 2  # rounds, or steps, after which what takes more than
HOPELESS = 1.5  # times as long as the fastest so far is not timed any more
STEPS_MARGIN = 0.95  # in place of `record.MARGIN` for whole steps, on a device that nobody shares
PATIENCE = 4  # times the limit that a start may take on a CPU that other programs are at work on
CLEARLY = 0.98  # of a step's time, where whole steps are timed that differ in nothing but the training pass
LATE = "not tried: the time was up"
STEP, GRADIENT = "a training step", "a gradient of the ledger's images"


class Inputs(NamedTuple):
    """What a step is given. gathered: what a captured one is given where it gathers the images itself: index and
    order, as `CapturedStep.gathered` takes them. gather: makes the batch of these."""

    batch: Batch
    key: torch.Tensor
    method: Method
    gathered: tuple[torch.Tensor, torch.Tensor] | None = None
    gather: Callable[[torch.Tensor, torch.Tensor], Batch] | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of the captured step's `verify`, and of the captured step or its `gathered`."""
        given = (self.batch,) if self.gathered is None else self.gathered
        return (*given, self.key, self.method)


@dataclass
class Trial:
    """make: from a candidate to its net. capture: makes a captured step of `step`. ledger: None where the user has
    named the net, which is then not judged. limit: seconds, after which no candidate is begun once one has passed.
    Where gradients are timed, half of them are kept for the whole ledger of the fastest; if they do not suffice,
    the most preferred one of those that passed is taken. trained: from its name to a training pass. passes: their
    ledger; None where there is nothing to judge."""

    step: Step
    inputs: Inputs
    make: Callable[[Candidate], Net]
    capture: Callable[[], CapturedStep]
    ledger: Ledger | None
    limit: float
    nets: dict[Candidate, Net] = field(default_factory=dict)
    trained: Callable[[str], torch.nn.Module] | None = None
    passes: PassLedger | None = None

    def run(
        self, first: list[Candidate], last: list[Candidate], trainings: tuple[str, ...] = ()
    ) -> tuple[list[Tried], Tried | None, str]:
        """What came of the candidates, by preference; the one that is to be taken, None where all are refused; and
        what their times are of. last: tried where none of the first are right. trainings: names of training passes
        that are then tried with the best."""
        self.spent, self._least = Spent(self._whole), float("inf")
        before, tried, best = (self.step.net, self.step.trained), list[Tried](), None
        try:
            for candidates in (first, last):
                tried += (tier := [Tried(candidate) for candidate in candidates])
                if best := self._best(tier):
                    break
            if best is not None and trainings:
                tried += (more := [Tried(replace(best.candidate, training=name)) for name in trainings])
                best = self._best_pass(best, more)
        finally:
            self.step.net, self.step.trained = before
            self.nets.clear()
        return tried, best, STEP if self._whole else GRADIENT

    @property
    def _whole(self) -> bool:
        """Whether steps are timed; else gradients, where a step takes seconds and only attacks are compared."""
        return graphs(self.step.precision.device)

    @property
    def _late(self) -> bool:
        return self.spent.seconds > (self.limit if self._whole else self.limit / 2)

    def _best(self, tier: list[Tried]) -> Tried | None:
        with progress(len(tier), "engine", unit="candidates") as bar:
            for number, t in enumerate(tier):
                if self._late and any(not other.refused for other in tier[:number]):
                    t.refused = LATE
                else:
                    # all start from the weights with which the ledger's reference was computed
                    with untouched(self.step, self.inputs.method):
                        t.refused = self._attempt(self._prove, t)
                release(self.step.precision.device)
                bar.advance(1, str(t.candidate))
        with untouched(self.step, self.inputs.method):
            for number in range(0 if self._whole or len(tier) < 2 else ROUNDS):
                if number and self._late:
                    break
                for t in [t for t in tier if number < SURE or not hopeless(t, tier)]:
                    t.refused = t.refused or self._attempt(self._time_gradient, t)
            if not self._whole and self.spent.seconds > self.limit:
                return next((t for t in tier if not t.refused), None)
            while best := fastest(tier, STEPS_MARGIN if self._whole else MARGIN):
                wrong = self._attempt(self._judge, best) if self.ledger is not None else ""
                if not wrong:
                    return best
                for t in tier:
                    if t.candidate.computes == best.candidate.computes:
                        t.refused, t.ledger = t.refused or wrong, best.ledger
        return None

    @staticmethod
    def _attempt(what: Callable[[Tried], str], t: Tried) -> str:
        """What is wrong with a candidate; also what it raises: a compiler, a library or the model's own code may
        raise anything, and nothing of it is a reason for a run to end."""
        try:
            return what(t)
        except Exception as error:
            return reason(error)

    def _net(self, candidate: Candidate) -> Net:
        # one for a step that is captured or not, unless its layers are measured for one of them
        known = replace(candidate, captured=candidate.captured and candidate.tuned, training="")
        if known not in self.nets:
            self.nets[known] = self.make(candidate)
        return self.nets[known]

    def _judge(self, t: Tried) -> str:
        """The whole ledger."""
        assert self.ledger is not None
        t.ledger = self.ledger.row(self._net(t.candidate))
        return breach(t.ledger)

    def _prove(self, t: Tried) -> str:
        """Build it; the quick part of the ledger; where steps are timed, the graph's proof and the time."""
        net = self._net(t.candidate)
        if self.ledger is not None:
            t.ledger = {"mass_agreeing": self.ledger.share(net)}
            if wrong := breach(t.ledger):
                return wrong
        if not self._whole:
            return ""
        self.step.net = net
        return self._time_whole(t)

    def _best_pass(self, best: Tried, more: list[Tried]) -> Tried:
        """The candidate with the training pass that is fastest, if clearly so; else the best as it is."""
        with progress(len(more), "engine", unit="training passes") as bar:
            for t in more:
                if self._late:
                    t.refused = LATE
                else:
                    with untouched(self.step, self.inputs.method):
                        t.refused = self._attempt(partial(self._prove_pass, best), t)
                release(self.step.precision.device)
                bar.advance(1, str(t.candidate))
        passed = [t for t in more if not t.refused]
        quickest = min(passed, key=lambda t: t.ledger["time_of_plain"], default=None)
        clearly = CLEARLY if self._whole else MARGIN
        return best if quickest is None or quickest.ledger["time_of_plain"] > clearly else quickest

    def _prove_pass(self, best: Tried, t: Tried) -> str:
        """Its ledger; then its time beside the plain one's, of whole steps or else of the pass alone."""
        assert self.trained is not None
        assert self.passes is not None
        before, trained = self.step.trained, self.trained(t.candidate.training)
        t.ledger = self.passes.row(trained)
        if wrong := breach_of_pass(t.ledger):
            return wrong
        if not self._whole:
            times: list[list[float]] = [[], []]
            for _ in range(ROUNDS):
                for net, taken in zip((trained, self.step.model), times, strict=True):
                    work = partial(self.passes.run, net, self.step.precision)
                    taken.append(seconds(work, 1, self.step.precision.device))
            t.ledger["time_of_plain"] = min(times[0]) / min(times[1])
            return ""
        try:
            self.step.net, self.step.trained = self._net(t.candidate), trained
            wrong = self._time_whole(t)
        finally:
            self.step.trained = before
        if t.milliseconds is not None and best.milliseconds is not None:
            t.ledger["time_of_plain"] = t.milliseconds / best.milliseconds
        return wrong

    def _time_whole(self, t: Tried) -> str:
        """Prove and time steps of the candidate, whose parts the step has."""
        if not t.candidate.captured:
            t.milliseconds = self._time_steps(self._eager)
            self._least = min(self._least, t.milliseconds)
            return ""
        captured = self.capture()
        try:
            if wrong := flaw(captured, *self.inputs.arguments):
                return wrong
            run = captured if self.inputs.gathered is None else captured.gathered
            t.milliseconds = self._time_steps(lambda: run(*self.inputs.arguments))
            self._least = min(self._least, t.milliseconds)
        finally:
            captured.forget()
        return ""

    def _eager(self) -> object:
        inputs = self.inputs
        batch = inputs.batch
        if inputs.gather is not None and inputs.gathered is not None:
            batch = inputs.gather(*inputs.gathered)
        return self.step(batch, inputs.key, inputs.method)

    def _time_steps(self, step: Callable[[], object]) -> float:
        """Milliseconds of one, as the run will take them."""
        device = self.step.precision.device
        step()
        once = seconds(step, 1, device)
        most = SURE if 1e3 * once > HOPELESS * self._least else STEPS
        count = max(SURE, min(most, int(SECONDS / max(once, 1e-6))))
        return 1e3 * seconds(step, count, device) / count

    def _time_gradient(self, t: Tried) -> str:
        """The least time of those so far."""
        assert self.ledger is not None  # a net that the user has named has no rival without graphs
        work = partial(self.ledger.gradient, self._net(t.candidate))
        taken = 1e3 * seconds(work, 1, self.step.precision.device)
        t.milliseconds = taken if t.milliseconds is None else min(t.milliseconds, taken)
        return ""


class Spent:
    """seconds: that went by since; on a CPU that this process has worked with all its threads, and at least a
    quarter of those that went by. So two starts come equally far, also beside other programs."""

    def __init__(self, by_the_clock: bool) -> None:
        self.patience = 1 if by_the_clock else PATIENCE
        self.wall, self.own = time.monotonic(), time.process_time()

    @property
    def seconds(self) -> float:
        own = (time.process_time() - self.own) / torch.get_num_threads()
        return max(own, (time.monotonic() - self.wall) / self.patience)


def hopeless(t: Tried, tier: list[Tried]) -> bool:
    """Whether it has taken so much longer than another that more readings would not change what is taken."""
    times = [other.milliseconds for other in tier if not other.refused and other.milliseconds is not None]
    return t.milliseconds is not None and bool(times) and t.milliseconds > HOPELESS * min(times)


def seconds(work: Callable[[], object], count: int, device: torch.device) -> float:
    """That so many calls take, the device's work included."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(count):
        work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what a failure or a recording held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """An error in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
