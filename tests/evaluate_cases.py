"""Models, settings and fixtures of the evaluation's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mwpb_fast.config import EvaluationConfig, PrecisionConfig, recipe, to_dict
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.evaluation.autoattack import COMPONENTS
from mwpb_fast.evaluation.checkpoint import evaluate_run
from mwpb_fast.evaluation.contract import EvaluationAttack
from mwpb_fast.evaluation.evaluate import attack_all
from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.evaluation.request import Request
from mwpb_fast.evaluation.session import Session
from mwpb_fast.models import build_model

package = pytest.importorskip("pyautoattack")
PRECISION = make_precision(PrecisionConfig(device="cpu", dtype="fp32"))
EPS = Fraction(8, 255)


class ShortAutoAttack(package.AutoAttack):
    """The standard version with fewer iterations: the bookkeeping is what most tests are about."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter = 10
        self.fab.n_iter, self.square.n_queries = 5, 60


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "AutoAttack", ShortAutoAttack)
    for component, name, value in (("apgd-ce", "n_iter", 10), ("fab-t", "n_iter", 5), ("square", "n_queries", 60)):
        monkeypatch.setitem(COMPONENTS[component].parameters, name, value)  # both APGDs share theirs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def linear(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).eval()


def labelled(model: nn.Module, n: int = 40) -> tuple[Tensor, Tensor]:
    """Images of which the model gets all but every eighth right."""
    x = torch.rand(n, 3, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::8] = (y[::8] + 1) % 10
    return x, y


def config(*attacks: str, **options: Any) -> EvaluationConfig:
    return EvaluationConfig(attacks=attacks, eps=EPS, step_size=Fraction(1, 255), **options)


def run(
    model: nn.Module,
    images: Any,
    settings: EvaluationConfig,
    *,
    probes: dict[str, EvaluationAttack] | None = None,
    tick: Callable[[], None] = lambda: None,
    folder: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    return attack_all(Session(model, images, settings, PRECISION, folder, seed, probes), show=False, tick=tick)


def evaluated(target: Path, settings: EvaluationConfig | None = None, **options: Any) -> dict[str, Any]:
    return evaluate_run(Request(target, settings, show=False, **options))


# the result -----------------------------------------------------------------------------------------------------


def flags_of(result: dict[str, Any]) -> dict[str, str]:
    return {name: attack["flags"] for name, attack in result["attacks"].items()}


def untrained_state() -> dict[str, Any]:
    """What evaluations read of a checkpoint of digits.mwpb_at after three epochs; the model is untrained."""
    settings = recipe("digits.mwpb_at")
    return {
        "config": to_dict(settings),
        "classes": [str(digit) for digit in range(10)],
        "channels": 1,
        "normalize": None,
        "epoch": 3,
        "model": build_model(settings.model.name, num_classes=10, channels=1).state_dict(),
    }


# models of others -----------------------------------------------------------------------------------------------


class Wrap(nn.Module):
    """A function of a model and its images; weights and repr do not tell which."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self.model, x)


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(EvaluationError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
