"""What may be chosen among: the attack's net and number type, the training pass, and whether to capture it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mwpb_fast.config import Config
from mwpb_fast.engine.build import (
    GRAPHED,
    NETS,
    PLAIN_PASS,
    TRAININGS,
    TRIED,
    TRIED_TRAININGS,
    TUNED_TRAININGS,
    by_rule,
    named_training,
)
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.processor import cpu_has_bf16

GRAPH, ATTACK, TRAINING = "graph", "attack", "training"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Candidate:
    """net: its name in `NETS`. dtype: of the attack. captured: the whole step is a recorded graph. tuned: the
    implementation of each layer was chosen by measurement. training: its name in `TRAININGS`."""

    net: str
    dtype: str
    captured: bool = False
    tuned: bool = False
    training: str = PLAIN_PASS

    def __str__(self) -> str:
        return ", ".join([f"{self.net} {self.dtype}", *self._more()])

    def _more(self) -> list[str]:
        words = [word for word, on in (("captured", self.captured), ("tuned", self.tuned)) if on]
        return words if self.training == PLAIN_PASS else [*words, f"{self.training} training"]

    @property
    def computes(self) -> tuple[str, str]:
        """What the attack's values depend on; a graph does not change them."""
        return self.net, self.dtype

    def shares(self, other: Candidate, fault: str) -> bool:
        """Whether a fault of another is one of this, too. fault: one of its `GRAPH`, `ATTACK` or `TRAINING`."""
        if fault == GRAPH:
            return self == other
        return self.training == other.training if fault == TRAINING else self.computes == other.computes


def read_candidate(values: Any) -> Candidate:
    """The candidate that `dataclasses.asdict` wrote. Raises ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError("a choice is an object with net and dtype")
    net, dtype = values.get("net"), values.get("dtype")
    if net not in NETS or dtype not in DTYPES:
        raise ValueError(f"there is no engine {net} {dtype}; there are {', '.join(NETS)} in {', '.join(DTYPES)}")
    captured, tuned = (bool(values.get(word, False)) for word in ("captured", "tuned"))
    training = values.get("training", PLAIN_PASS)
    if training not in TRAININGS:
        raise ValueError(f"there is no training pass {training}; there are {', '.join(TRAININGS)}")
    return Candidate(str(net), str(dtype), captured, tuned, str(training))


def graphs(device: torch.device) -> bool:
    """Whether a step can be captured on that device; there it is also timed as a whole."""
    return device.type == "cuda"


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def preferred(config: Config, precision: Precision) -> Candidate:
    """What is taken without a trial. precision: the attack's."""
    net = "eager" if config.precision.oracle else by_rule(config, precision)
    tuned = config.precision.tune and net == "twin"
    training = named_training(config) or PLAIN_PASS
    return Candidate(net, dtype_name(precision.dtype), config.precision.capture is True, tuned, training)


def candidates(config: Config, precision: Precision) -> tuple[list[Candidate], list[Candidate]]:
    """What a trial compares, the most preferred first; and what is tried where none of them is right.

    precision: the attack's. Number types that the user has named are kept. Where he has not, a CPU that multiplies
    bfloat16 may attack in it while it trains in float32; on CUDA, where both are bfloat16 then, an attack in
    float32 is the last resort.
    """
    asked, own = config.precision, dtype_name(precision.dtype)
    free = asked.engine == "auto" and asked.dtype == asked.attack_dtype == "auto"
    foldable = config.attack_mode == "eval"
    nets = [name for name in TRIED[precision.device.type] if name == "eager" or foldable]
    nets = nets if asked.engine == "auto" else [asked.engine]
    training = named_training(config) or PLAIN_PASS
    capture = [asked.capture] if isinstance(asked.capture, bool) else [True, False][not graphs(precision.device) :]

    def grid(nets: list[str], dtype: str) -> list[Candidate]:
        # what is captured is the fastest, should the time be up; and the plain twin alone has layers to tune
        pairs = [(net, c) for c in capture for net in nets if c or net not in GRAPHED or asked.engine == net]
        return [Candidate(net, dtype, c, asked.tune and net == "twin", training) for net, c in pairs]

    first, last = grid(nets, own), []
    if free and own == "fp32" and precision.device.type == "cpu" and foldable and cpu_has_bf16():
        first[-1:-1] = grid([net for net in nets if net != "eager"], "bf16")
    if free and own == "bf16":
        last = grid(nets, "fp32")
    return (first, last) if not asked.oracle else ([preferred(config, precision)], [])


def trainings(config: Config, device: torch.device) -> tuple[str, ...]:
    """The training passes that a trial compares with the plain one, once it has the best net."""
    if named_training(config):
        return ()
    return TRIED_TRAININGS[device.type] + (TUNED_TRAININGS[device.type] if config.precision.tune else ())


def instead_of(
    failed: Candidate,
    fault: str,
    passed: list[Candidate],
    known: list[Candidate],
    config: Config,
    precision: Precision,
) -> list[Candidate]:
    """What may take the place of one that failed, the best first. passed: others that passed their trial. known:
    all that were in it. precision: the attack's."""
    chosen = preferred(config, precision)
    first, last = candidates(config, precision)
    plain = Candidate("eager", chosen.dtype, training=chosen.training)
    more = [*first, *last, *([plain] if config.precision.engine == "auto" else [])]
    found = passed + [candidate for candidate in more if candidate not in known]
    if fault == GRAPH:  # whatever else was refused, what fails as a graph can be run without one
        return [*found, replace(failed, captured=False)]
    if fault == TRAINING:
        found.insert(0, replace(failed, training=PLAIN_PASS))
    return [candidate for candidate in found if not candidate.shares(failed, fault)]
