"""Where a model or a mode cannot be folded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twin_cases import (
    CPU32,
    ORACLE,
    descend,
    needs_bf16,
    randomise,
    same,
    small,
)

from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.twin import EngineWarning, TwinNet, make_net


def test_train_mode_takes_the_plain_path_and_says_so_once() -> None:
    model, x = randomise(small()), torch.rand(4, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    y = torch.arange(4)
    for set_mode in (model.train, model[1].train):
        model.eval()
        set_mode()
        twin._told = False
        reference = EagerNet(copy.deepcopy(model), CPU32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = twin.logits(x)
            gradient = twin.input_grad(x, descend(y))
        assert [w.category for w in caught] == [EngineWarning]
        assert "train mode" in str(caught[0].message)
        assert torch.equal(logits, reference.logits(x))
        assert torch.equal(gradient, reference.input_grad(x, descend(y)))


class Branching(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Hidden(nn.Sequential):
    """What a trace does not see: half of the input's gradient is cut off."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            half = x / 2
        return super().forward(half + x / 2)


class Random(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), training=True)


def hooked() -> nn.Module:
    model = small()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


class Functional(nn.Sequential):
    """float32 weights that the twin reads live, which bfloat16 activations cannot meet."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self[1](self[0](x)))
        return self[4](self[3](F.conv2d(x, self[0].weight[:, :1].repeat(1, 6, 1, 1), padding=1)))


@needs_bf16
def test_functional_weights_fold_in_float32_alone() -> None:
    model, x = randomise(Functional(*small())), torch.rand(4, 3, 8, 8)
    same(make_net(model, CPU32, x), model, x)
    with pytest.warns(EngineWarning, match="cannot be compared"):
        assert isinstance(make_net(model, CPU32, x, torch.bfloat16), EagerNet)


UNFOLDABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "unknown layer": (lambda: nn.Sequential(nn.GroupNorm(1, 3), *small()), "0: GroupNorm"),
    "control flow": (lambda: Branching(*small()), "torch.fx cannot trace"),
    "hooks": (hooked, "0 has hooks"),
    "no statistics": (
        lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), *small()),
        "layer 0: its batch norm keeps no",
    ),
    "padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), *small()),
        "layer 0: padding mode reflect",
    ),
    "lopsided padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 2, padding="same"), *small()),
        "layer 0: its padding is not symmetric",
    ),
    "hidden gradient": (lambda: Hidden(*small()), "another input gradient"),
    "random": (lambda: Random(*small()), "another logits"),
}


def test_a_relu_at_zero_is_no_reason_against_a_twin() -> None:
    """Of one image every ReLU's argument is 0, which the folded form rounds to one side or the other."""
    found = 0
    for number in range(1, 20):
        model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten())
        model = nn.Sequential(*model, nn.Linear(16, 3)).eval()
        x = torch.rand(4, 1, 4, 4)
        x[0] = number / 20
        with torch.no_grad():
            model[0].weight.fill_(0.7)
            model[1].running_mean.fill_(model[0](x)[0, 0, 0, 0])
            model[1].running_var.fill_(0.3 + number)
        twin = TwinNet(model, CPU32, x)
        y = torch.zeros(4, dtype=torch.int64)
        ours, theirs = (net.input_grad(x, descend(y)) for net in (twin, EagerNet(model, CPU32)))
        torch.testing.assert_close(ours[1:], theirs[1:])
        found += not torch.equal(ours[0] == 0, theirs[0] == 0)
    assert found > 0


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_unfoldable_model_takes_the_plain_path_and_says_why(name: str) -> None:
    build, reason = UNFOLDABLE[name]
    model, x = randomise(build()), torch.rand(4, 3, 8, 8)
    with pytest.warns(EngineWarning, match=reason) as caught:
        net = make_net(model, CPU32, x)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert isinstance(net, EagerNet)
    assert not model.training


def test_oracle_is_never_folded() -> None:
    assert isinstance(make_net(randomise(small()), ORACLE, torch.rand(2, 3, 8, 8)), EagerNet)
    assert isinstance(make_net(randomise(small()), CPU32, torch.rand(2, 3, 8, 8)), TwinNet)
