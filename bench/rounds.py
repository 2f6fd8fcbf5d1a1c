"""Rounds in which contestants are timed in turn, with what the machine can do read beside them in each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from ceilings import matrix_rates
from measure import spread, turns


class Rounds:
    """`for turn in rounds:` so many, or at least three once `deadline` of time.monotonic() has passed.

    rates: FLOP/s of matrix products, by what they are computed in; load: the system's; of each round.
    """

    def __init__(
        self, count: int, deadline: float, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.count, self.deadline, self.device, self.clock = count, deadline, device, clock
        self.rates: dict[str, list[float]] = {}
        self.load: list[float] = []

    def __iter__(self) -> Iterator[int]:
        for turn in turns(self.count, self.deadline):
            for kind, rate in matrix_rates(self.device, self.clock).items():
                self.rates.setdefault(kind, []).append(rate)
            self.load.append(os.getloadavg()[0])
            yield turn

    def beside(self) -> dict[str, Any]:
        """What stands in a result file beside the rows."""
        return {"matrix_flop_per_second": {k: spread(v) for k, v in self.rates.items()}, "load": self.load}

    def shares(self, kind: str, flop: float, taken: Sequence[float]) -> dict[str, float]:
        """Of so many FLOP in each round's seconds, as a part of that round's rate."""
        return spread([flop / t / r for t, r in zip(taken, self.rates[kind], strict=True)])
