"""A twin follows what else of its model changes than weights: modules and attributes; or says that it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twin_cases import CPU32, same

from mwpb_fast.engine import twin as twins
from mwpb_fast.engine.twin import EngineWarning, TwinNet


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Sequential(nn.Conv2d(8, 8, 3, stride=1, padding=1)), nn.Linear(8, 5)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("shift", torch.zeros(8, 1, 1))
        self.plain = torch.ones(8, 1, 1)
        self.temperature, self.options, self.calls = 1.0, {"slope": 0.5}, 0
        self.settings = SimpleNamespace(gain=1.0, inner=SimpleNamespace(gain=1.0))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.body(F.leaky_relu(self.norm(self.stem(x)), self.options["slope"]))
        x = F.relu(x) * self.gain * self.plain + self.shift
        gain = self.settings.gain * self.settings.inner.gain
        return gain * self.temperature * self.head(x.mean((2, 3)))


CHANGES: dict[str, Callable[[Scaled], object]] = {
    "a number": lambda m: setattr(m, "temperature", 5.0),
    "an object's attribute": lambda m: setattr(m.settings, "gain", 5.0),
    "an object's object's": lambda m: setattr(m.settings.inner, "gain", 5.0),
    "a dictionary in place": lambda m: m.options.update(slope=0.1),
    "the head": lambda m: setattr(m, "head", nn.Linear(8, 7)),
    "a layer of a Sequential": lambda m: m.body.__setitem__(0, nn.Conv2d(8, 8, 1)),
    "one more layer": lambda m: m.body.append(nn.Conv2d(8, 8, 1)),
    "a stride": lambda m: setattr(m.body[0], "stride", (2, 2)),
    "a norm's epsilon": lambda m: setattr(m.norm, "eps", 0.5),
    "a bare parameter": lambda m: setattr(m, "gain", nn.Parameter(torch.rand(8, 1, 1))),
    "a layer's weight": lambda m: setattr(m.stem, "weight", nn.Parameter(torch.rand(8, 3, 3, 3))),
    "a layer's bias taken": lambda m: setattr(m.stem, "bias", None),
    "a buffer": lambda m: setattr(m, "shift", torch.rand(8, 1, 1)),
    "a plain tensor": lambda m: setattr(m, "plain", torch.rand(8, 1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_twin_follows_a_change_at_refresh(change: str) -> None:
    model, x = Scaled(), torch.rand(4, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    before = twin.logits(x)
    CHANGES[change](model)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.refresh()
    after = twin.logits(x)
    assert after.shape != before.shape or not torch.allclose(after, before)
    same(twin, model, x)


def test_attributes_that_say_nothing_cost_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Scaled(), torch.rand(4, 3, 8, 8)
    twin, traced, fold = TwinNet(model, CPU32, x), [], twins.fold
    monkeypatch.setattr(twins, "fold", lambda model: traced.append(1) or fold(model))
    layers = twin.layers
    for _ in range(4):
        model(x)  # counts its calls
        twin.refresh()
    assert len(traced) == 1
    assert twin.layers is layers
    model.temperature = 2.0
    twin.refresh()
    same(twin, model, x)


def test_what_cannot_be_folded_any_more_takes_the_plain_path_and_comes_back() -> None:
    model, x = Scaled(), torch.rand(4, 3, 8, 8)
    twin, body = TwinNet(model, CPU32, x), model.body
    model.body = nn.GroupNorm(2, 8)
    with pytest.warns(EngineWarning, match="has changed and cannot be folded any more"):
        twin.refresh()
    assert torch.equal(twin.logits(x), model(x))
    model.body = body
    model.forward = lambda x: model.head(model.stem(x).mean((2, 3)))  # type: ignore[method-assign]
    with pytest.warns(EngineWarning, match="gives another logits"):  # of code that a trace does not reach
        twin.refresh()
    assert torch.equal(twin.logits(x), model(x))
    del model.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.refresh()
    assert twin.layers
    same(twin, model, x)
