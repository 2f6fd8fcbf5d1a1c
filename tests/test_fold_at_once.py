"""A twin whose rounded weights are folded at once, as on CUDA, against the passes one after the other."""

from __future__ import annotations

from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from twin_cases import CPU32, MODELS, needs_bf16, randomise

from mwpb_fast.engine import fold
from mwpb_fast.engine.layers import Folded
from mwpb_fast.engine.twin import TwinNet


@needs_bf16
@pytest.mark.parametrize("name", ["smallresnet-5", "vgg", "wrn-16-2"])
def test_it_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = MODELS[name]
    model, x = randomise(build()), torch.rand(shape)
    one, other = (TwinNet(model, CPU32, x, torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    calls: list[int] = []

    def at_once(layer: Folded) -> bool:
        """As on CUDA."""
        source: Any = layer.of[0]
        return layer.weight is not layer.weight32 and layer.scale is not None and source is not None

    def fold_(weights: list[torch.Tensor], *lists: list[torch.Tensor]) -> None:
        calls.append(len(weights))
        for weight in weights:
            weight.fill_(torch.nan)
        into(weights, *lists)

    into = ops.fold_
    one.refresh()
    monkeypatch.setattr(fold, "at_once", at_once)
    monkeypatch.setattr(ops, "fold_", fold_)
    other.refresh()
    assert calls == [sum(map(at_once, other.layers))]
    assert calls[0] > 1
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.weight, b.weight), a.name
        assert (a.bias is None and b.bias is None) or torch.equal(a.bias, b.bias), a.name
    assert torch.equal(one.logits(x), other.logits(x))


def test_on_a_cpu_it_is_not_asked_for() -> None:
    build, shape = MODELS["smallresnet-5"]
    twin = TwinNet(randomise(build()), CPU32, torch.rand(shape))
    assert not any(map(fold.at_once, twin.layers))
