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


HELPERS = """
import functools
import numpy as np
import torch
LIMIT, NOISE, ARRAY = {v}, torch.ones(2) * {v}, np.ones(2) * {v}
TABLE = {{"f": lambda x: x * {v}}}
def unused(x):
    return x * {other}
def f(x):
    return x * {v}
def keyword(x, *, by={v}):
    return x * by
def positional(x, by={v}):
    return x * by
@functools.lru_cache
def cached(by):
    return by * {v}
@torch.no_grad()
def decorated(x):
    return x * {v}
class Thing:
    by, with_tensor, made = {v}, torch.ones(2) * {v}, functools.partial(f)
    def method(self, x):
        return x * self.by
    @functools.cached_property
    def late(self):
        return {v}
    @classmethod
    def of(cls, x):
        return x * {v}
thing, made = Thing(), functools.partial(torch.mul, {v})
class Slotted:
    __slots__ = ("by",)
    def __init__(self):
        self.by = {v}
slotted = Slotted()
def tried(x):
    try:
        y = x * 2
    except ValueError:
        y = x
    return y * {v}
"""
USES = {
    "a module's function": "helpers.f(x)",
    "a package's module's": "pack.helpers.f(x)",
    "imported by its name": "f(x)",
    "a number of a module": "x * helpers.LIMIT",
    "a tensor of a module": "x * helpers.NOISE",
    "an array of a module": "x * torch.from_numpy(helpers.ARRAY)",
    "by getattr": "getattr(helpers, 'f')(x)",
    "in a dictionary": "helpers.TABLE['f'](x)",
    "a keyword's default": "helpers.keyword(x)",
    "a default": "helpers.positional(x)",
    "cached": "x * helpers.cached(1)",
    "decorated": "helpers.decorated(x)",
    "a bound method": "helpers.thing.method(x)",
    "a class method": "helpers.Thing.of(x)",
    "a class's tensor": "x * helpers.Thing.with_tensor",
    "a cached property": "x * helpers.thing.late",
    "a partial of a class": "helpers.Thing.made(x)",
    "a partial": "helpers.made(x)",
    "slots": "x * helpers.slotted.by",
    "imported inside": "__import__('their_helpers').f(x)",
    "an object's attribute": "self.thing.method(x)",
    "a list's": "self.listed[0](x)",
    "a closure": "self.closed(x)",
    "a module held": "self.module.f(x)",
    "a hook": "self.hooked(x)",
}
NETS = """
import torch, their_helpers as helpers
from their_helpers import f
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.thing, self.listed, self.module = helpers.Thing(), [helpers.f], helpers
        self.hooked = torch.nn.Identity()
        self.hooked.register_forward_hook(lambda module, x, y: helpers.f(y))
        def close(held):
            return lambda x: held(x)
        self.closed = close(helpers.f)
        for name in ("thing", "listed", "module", "hooked", "closed"):
            if name not in {use!r}:
                delattr(self, name)
    def forward(self, x):
        return {use}
"""


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """A model whose forward pass is that expression, of helpers of a module of their own."""

    def make(use: str, v: float = 2.0, other: float = 2.0) -> nn.Module:
        made = {name: types.ModuleType(name) for name in ("their_helpers", "pack", "their_nets")}
        for name in made:
            monkeypatch.setitem(sys.modules, name, made[name])
        exec(compile(HELPERS.format(v=v, other=other), "their_helpers.py", "exec"), made["their_helpers"].__dict__)
        made["pack"].helpers = made["their_helpers"]  # type: ignore[attr-defined]
        made["their_nets"].pack = made["pack"]  # type: ignore[attr-defined]
        exec(compile(NETS.format(use=use), "their_nets.py", "exec"), made["their_nets"].__dict__)
        net: nn.Module = made["their_nets"].Net()
        return net

    return make


@pytest.mark.parametrize("use", USES)
def test_what_the_code_reaches_counts(use: str, helped: Callable[..., nn.Module]) -> None:
    first = hash_code(helped(USES[use]))
    assert hash_code(helped(USES[use])) == first
    assert hash_code(helped(USES[use], v=3.0)) != first
    if use not in ("a module held", "an object's attribute"):
        assert hash_code(helped(USES[use], other=3.0)) == first, "what is not used does not count"


def test_installed_code_counts_by_its_name(helped: Callable[..., nn.Module]) -> None:
    """Whose version is in a key already; one function of it is not another."""
    relu, gelu = (helped(f"torch.nn.functional.{name}(x)") for name in ("relu", "gelu"))
    assert hash_code(relu) != hash_code(gelu)
    assert hash_code(Called(torch.relu)) == hash_code(Called(torch.tanh)) == ""
    one, two = (functools.partial(torch.mul, by) for by in (2.0, 3.0))
    assert hash_code(Called(one)) != hash_code(Called(two))


def test_models_that_hold_each_other_end() -> None:
    one, two = Called(lambda x: x), Called(lambda x: x)
    vars(one)["other"], vars(two)["other"] = [two], [one]
    assert hash_code(one) == hash_code(one) != ""


def test_the_code_of_a_program_counts() -> None:
    class Net(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.by

    one, two = (torch.jit.trace(Net(by), torch.ones(1)) for by in (2.0, 3.0))
    assert hash_code(one) != hash_code(two)


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
    code = (
        "from mwpb_fast.evaluation.code import hash_code, hash_attributes; import their_nets\n"
        "net = their_nets.Net(); net.kinds = {1: [{'x', 'y', 'z'}]}; print(hash_code(net), hash_attributes(net))"
    )
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
