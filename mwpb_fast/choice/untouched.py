"""Steps that leave no trace: weights, statistics, memories, optimiser and generators are afterwards as before."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from mwpb_fast.method import Method
from mwpb_fast.step import Step


@contextlib.contextmanager
def untouched(step: Step, method: Method) -> Iterator[None]:
    """Whatever steps are taken inside, with `method`, a run goes on as if there had been none."""
    state = step.state(method)
    before = {name: value.detach().clone() for name, value in state.items()}
    modes = [(module, module.training) for module in step.model.modules()]
    known = {parameter: set(step.optimizer.state.get(parameter, ())) for parameter in step.parameters}
    scaling, device = step.scaler.state_dict(), step.precision.device
    averaged = 0 if step.average is None else step.average.steps
    drawn: Any = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    drawn_by_numpy = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(before[name])
        if step.average is not None:
            step.average.steps = averaged
        for module, training in modes:
            module.training = training
        for parameter, names in known.items():
            kept = step.optimizer.state.get(parameter, {})
            for name in set(kept) - names:  # an optimiser that begins with its first step is to begin later
                del kept[name]
        step.optimizer.zero_grad()
        if hasattr(step.optimizer, "found_inf"):
            del step.optimizer.found_inf
        if step.scaler.is_enabled():
            step.scaler.load_state_dict(scaling)
        random.setstate(drawn)
        if numpy is not None:
            numpy.random.set_state(drawn_by_numpy)
