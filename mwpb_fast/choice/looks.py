"""What is wrong with what a run's steps go through, by a look on a batch of the run; "" where nothing is found.

Of several processes each looks at its own part of the batch, and what one finds is wrong for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mwpb_fast.capture import CapturedStep
from mwpb_fast.choice import pass_ledger
from mwpb_fast.choice.ledger import breach
from mwpb_fast.choice.proof import flaw
from mwpb_fast.choice.trial import reason
from mwpb_fast.choice.untouched import untouched
from mwpb_fast.engine.parallel import apart
from mwpb_fast.method import Method
from mwpb_fast.system import ranks

if TYPE_CHECKING:
    from mwpb_fast.choice.engine import Engine


def at_attack(engine: Engine, epoch: int, key: torch.Tensor, method: Method) -> str:
    """By the quick part of the ledger."""

    def look() -> str:
        with engine.precision.mode(), untouched(engine.step, method), apart(engine.step.model):
            share = engine.ledger(engine.inputs(epoch, 0, key, method)).share(engine.step.net)
        return breach({"mass_agreeing": share})

    return _found(look)


def at_pass(engine: Engine, epoch: int, key: torch.Tensor, method: Method) -> str:
    """By the ledger of the training pass."""

    def look() -> str:
        step = engine.step
        with engine.precision.mode(), untouched(step, method), apart(step.model):
            row = engine.pass_ledger(engine.inputs(epoch, 0, key, method)).row(step.trained or engine.model)
        return pass_ledger.breach(row)

    return _found(look)


def at_graph(
    engine: Engine, captured: CapturedStep, epoch: int, start: int, key: torch.Tensor, method: Method
) -> str:
    """By a step, with all that processes tell each other in it, against its replay."""
    return _found(lambda: flaw(captured, *engine.inputs(epoch, start, key, method).arguments))


def _found(look: Callable[[], str]) -> str:
    try:
        wrong = look()
    except Exception as error:
        wrong = reason(error)
    return ranks.agreed(wrong)
