"""What is changed by hand between two replays: it is recorded anew, so that a replay stays the eager step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_cases import AT, CPU, assert_same, assert_same_result, batch, capture, make_step, values
from method_cases import method
from test_twin_changes import CHANGES as OF_A_MODEL
from test_twin_changes import Scaled
from torch import Tensor, nn

from mwpb_fast.config import ConfigError, OptimConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Attack, Batch, Method
from mwpb_fast.optim import Average, make_optimizer
from mwpb_fast.step import Step


class Pushed(Attack):
    """A point of each ball, as far as a number of its own says."""

    def __init__(self) -> None:
        self.far = 0.5

    def __call__(self, net: Any, batch: Batch, clean: Any, radius: Tensor, *rest: Any) -> Tensor:
        return batch.x + self.far * radius.view(-1, 1, 1, 1)


def five(number: int) -> tuple[Batch, Tensor]:
    """A batch for five classes."""
    (x, y, index), key = batch(number)
    return Batch(x, y % 5, index), key


def make(engine: str) -> tuple[Step, Method]:
    torch.manual_seed(3)
    model: Any = Scaled()
    net = TwinNet(model, CPU, batch(0)[0].x) if engine == "twin" else EagerNet(model, CPU)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))
    return Step(model, net, optimizer, CPU, average=Average(model, 0.9)), method(attack=Pushed())


def follows(engine: str, change: Callable[[Step, Method], object], new: int = 1) -> None:
    (eager, one), (other, two) = make(engine), make(engine)
    captured = capture(other)
    for number in range(4):
        if number == 2:
            for step, asked in ((eager, one), (other, two)):
                torch.manual_seed(9)
                change(step, asked)
        assert_same_result(eager(*five(number), one), captured(*five(number), two))
        assert_same(values(eager, one), values(other, two))
    assert captured.captures == 1 + new


@pytest.mark.parametrize("engine", ["eager", "twin"])
@pytest.mark.parametrize("change", OF_A_MODEL)
@pytest.mark.filterwarnings("ignore:the model has changed and cannot be folded")
def test_of_the_model(change: str, engine: str) -> None:
    follows(engine, lambda step, _: OF_A_MODEL[change](step.model))  # type: ignore[arg-type]


def decayed(step: Step, asked: Method) -> None:
    step.optimizer.param_groups[0]["weight_decay"] = 0.5


def averaged(step: Step, asked: Method) -> None:
    assert step.average is not None
    step.average.decay = 0.5


CHANGES: dict[str, Callable[[Step, Method], object]] = {
    "the optimiser's decay": decayed,
    "the average's decay": averaged,
    "the net": lambda step, _: setattr(
        step, "net", EagerNet(nn.Sequential(step.model, nn.Softmax(1)).eval(), CPU)
    ),
    "clipping": lambda step, _: setattr(step, "clip_norm", 0.01),
    "a natural pass": lambda step, _: setattr(step, "natural_pass", True),
    "a number of the attack": lambda _, asked: setattr(asked.attack, "far", -0.5),
    "memory of the weights": lambda step, _: setattr(step.model.stem.weight, "data", torch.rand(8, 3, 3, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_of_anything_else(change: str) -> None:
    follows("eager", CHANGES[change])


def test_what_says_nothing_is_not_recorded_anew() -> None:
    """What is fed, what every step counts, and which modes the modules are in between steps."""
    follows("twin", lambda step, _: step.model(five(0)[0].x).sum().item(), new=0)  # counts its calls
    follows("eager", lambda step, _: step.model.train(), new=0)
    follows("eager", lambda step, _: step.optimizer.param_groups[0]["lr"].fill_(0.3), new=0)


def test_other_memory_of_the_optimiser() -> None:
    step, asked = make("eager")
    captured = capture(step)
    captured(*five(0), asked)
    kept = step.optimizer.state[step.parameters[0]]
    kept["momentum_buffer"] = kept["momentum_buffer"].clone()
    captured(*five(1), asked)
    assert captured.captures == 2


def test_a_change_that_cannot_be_recorded_is_told_of() -> None:
    step = make_step()
    captured = capture(step)
    captured(*batch(0), AT)
    step.net = EagerNet(nn.Sequential(nn.Dropout(), step.model), CPU)
    with pytest.raises(ConfigError, match="draws from the global generator"):
        captured(*batch(1), AT)
