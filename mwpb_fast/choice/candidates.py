"""What may be chosen among: a net for the attack, the attack's number type, and whether the step is captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mwpb_fast.config import Config
from mwpb_fast.engine.build import GRAPHED, NETS, TRIED, by_rule
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.processor import cpu_has_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Candidate:
    """net: its name in `NETS`. dtype: of the attack. captured: the whole step is a recorded graph. tuned: the
    implementation of each layer was chosen by measurement."""

    net: str
    dtype: str
    captured: bool = False
    tuned: bool = False

    def __str__(self) -> str:
        return ", ".join([f"{self.net} {self.dtype}", *self._more()])

    def _more(self) -> list[str]:
        return [word for word, on in (("captured", self.captured), ("tuned", self.tuned)) if on]

    @property
    def computes(self) -> tuple[str, str]:
        """What the attack's values depend on; a graph does not change them."""
        return self.net, self.dtype


def read_candidate(values: Any) -> Candidate:
    """The candidate that `dataclasses.asdict` wrote. Raises ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError("a choice is an object with net and dtype")
    net, dtype = values.get("net"), values.get("dtype")
    if net not in NETS or dtype not in DTYPES:
        raise ValueError(f"there is no engine {net} {dtype}; there are {', '.join(NETS)} in {', '.join(DTYPES)}")
    captured, tuned = (bool(values.get(word, False)) for word in ("captured", "tuned"))
    return Candidate(str(net), str(dtype), captured, tuned)


def graphs(device: torch.device) -> bool:
    """Whether a step can be captured on that device; there it is also timed as a whole."""
    return device.type == "cuda"


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def preferred(config: Config, precision: Precision) -> Candidate:
    """What is taken without a trial. precision: the attack's."""
    net = "eager" if config.precision.oracle else by_rule(config, precision)
    tuned = config.precision.tune and net == "twin"
    return Candidate(net, dtype_name(precision.dtype), config.precision.capture is True, tuned)


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
    capture = [asked.capture] if isinstance(asked.capture, bool) else [True, False][not graphs(precision.device) :]

    def grid(nets: list[str], dtype: str) -> list[Candidate]:
        # what is captured is the fastest, should the time be up; and the plain twin alone has layers to tune
        pairs = [(net, c) for c in capture for net in nets if c or net not in GRAPHED or asked.engine == net]
        return [Candidate(net, dtype, c, asked.tune and net == "twin") for net, c in pairs]

    first, last = grid(nets, own), []
    if free and own == "fp32" and precision.device.type == "cpu" and foldable and cpu_has_bf16():
        first[-1:-1] = grid([net for net in nets if net != "eager"], "bf16")
    if free and own == "bf16":
        last = grid(nets, "fp32")
    return (first, last) if not asked.oracle else ([preferred(config, precision)], [])
