"""A shard's key covers code: a change that no probe image shows leads to new results, and nothing else does."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import config, flags_of, labelled, linear, run
from evaluate_cases import one_thread as one_thread  # an autouse fixture
from torch import nn

from mwpb_fast.evaluation.code import hash_code
from mwpb_fast.evaluation.watched import Called
from mwpb_fast.models import build_model

SOURCE = """
import torch
from torch import nn
LIMIT = {limit}
def shifted(x):
    return x - {shift}
class Step(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * {inner}
    @staticmethod
    def backward(context, g):
        return g
class Helper:
    scale, names = {scale}, {{"a", "b", "c"}}
    def __call__(self, x):
        return x * {held} * self.scale
class Base(nn.Module):
    def finish(self, x):
        return x if {rare} else -x
class Net(Base):
    def __init__(self):
        super().__init__()
        self.weight, self.helper = nn.Parameter(torch.ones(3, 2)), Helper()
        self.eval()
    def forward(self, x, default={default}):
        z = self.helper(shifted(Step.apply(x))).mean((2, 3)) @ self.weight
        if "never" in {{"x", "y", "z"}} or LIMIT > 99:
            z = [v for v in z if {nested}]
        return self.finish(z)
"""
VALUES = {
    "limit": 3, "shift": 0.5, "inner": 1.0, "held": 2.0, "rare": "x.sum() > -9", "default": 1, "scale": 1,
    "nested": "v.sum() > 0",
}  # fmt: skip
CHANGED = {
    "limit": 4, "shift": 0.25, "inner": 2.0, "held": 3.0, "rare": "x.sum() > -8", "default": 2, "scale": 2,
    "nested": "v.sum() > 1",
}  # fmt: skip


def made(**changes: Any) -> nn.Module:
    module = types.ModuleType("their_code")
    exec(compile(SOURCE.format(**VALUES | changes), "their_code.py", "exec"), module.__dict__)
    net: nn.Module = module.Net()
    return net


@pytest.mark.parametrize("what", VALUES)
def test_every_part_of_the_code_counts(what: str) -> None:
    assert hash_code(made()) == hash_code(made())
    assert hash_code(made(**{what: CHANGED[what]})) != hash_code(made())


def test_closures_count_and_what_they_hold() -> None:
    inner = linear()

    def model(limit: float, weight: torch.Tensor, net: nn.Module = inner) -> nn.Module:
        return Called(lambda x: net(x) if x.mean() < limit else x.flatten(1) @ weight)

    w = torch.rand(48, 10)
    first = hash_code(model(1.0, w))
    assert hash_code(model(1.0, w.clone())) == first
    assert hash_code(model(1.1, w)) != first
    assert hash_code(model(1.0, w + 1e-7)) != first
    assert hash_code(Called(functools.partial(torch.mul, 2.0))) == hash_code(
        Called(functools.partial(torch.mul, 2.0))
    )
    with torch.no_grad():
        inner[1].weight[0, 0] += 1e-7  # type: ignore[index]
    assert hash_code(model(1.0, w)) != first


def test_what_has_a_version_has_no_code() -> None:
    """So that the key of every model of ours, and of PyTorch's own modules, is what it was."""
    assert hash_code(build_model("smallresnet-8", num_classes=10, channels=1)) == ""
    assert hash_code(linear()) == ""


def test_it_is_the_same_in_every_process(tmp_path: Path) -> None:
    """The sets in the code have an order of their own in each."""
    (tmp_path / "their_nets.py").write_text(SOURCE.format(**VALUES), encoding="utf-8")
    code = "import their_nets; from mwpb_fast.evaluation.code import hash_code; print(hash_code(their_nets.Net()))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_a_change_that_no_probe_shows_is_done_again(tmp_path: Path) -> None:
    model = linear()
    x, y = labelled(model)

    def odd(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        special = x[i].mean()  # one image, which is none of the probes

        def function(x: torch.Tensor) -> torch.Tensor:
            return torch.where(((x.mean((1, 2, 3)) - special).abs() < 1e-6)[:, None], -model(x), model(x))

        return function

    for i in (5, 6):
        result = flags_of(run(odd(i), (x, y), config("natural"), folder=tmp_path / "e"))  # type: ignore[arg-type]
        assert result == flags_of(run(odd(i), (x, y), config("natural")))  # type: ignore[arg-type]
        assert result["natural"][i] == "0"
