"""Convolutions over few positions as matrix products: the convolution's own values, gradients and rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twin_cases import needs_bf16

from mwpb_fast.engine import small_maps
from mwpb_fast.engine.layers import FoldedConv
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.small_maps import Convolution, Products, serves
from mwpb_fast.engine.twin import TwinNet

ONES = ((1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1), (2, 2), (3, 4), (4, 4), (5, 6)])
def test_it_is_the_convolution(size: tuple[int, int], layout: torch.memory_format) -> None:
    x = torch.randn(3, 5, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(7, 5, 3, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    products = Products(weight)
    products.follow()
    for added in (bias, None):
        got, expected = Convolution.apply(x, products, added), torch.conv2d(x, weight, added, 1, 1)
        torch.testing.assert_close(got, expected)
        assert got.is_contiguous(memory_format=torch.channels_last)
        gradient = torch.randn_like(expected)
        mine, theirs = (torch.autograd.grad(out, x, gradient)[0] for out in (got, expected))
        torch.testing.assert_close(mine, theirs)


def test_it_follows_its_weight() -> None:
    weight, x = torch.randn(2, 2, 3, 3), torch.randn(1, 2, 3, 3)
    products = Products(weight)
    products.follow()
    before = Convolution.apply(x, products, None)
    torch._foreach_mul_([weight], 2.0)
    assert torch.equal(Convolution.apply(x, products, None), before)
    products.follow()
    torch.testing.assert_close(Convolution.apply(x, products, None), 2 * before)


def test_only_what_measured_faster_is_served() -> None:
    weight = torch.empty(512, 512, 3, 3, dtype=torch.bfloat16)
    x = torch.empty(32, 512, 4, 4, dtype=torch.bfloat16)
    assert serves(x, weight, ONES, 1)
    assert not serves(x, weight.float(), ONES, 1)
    assert not serves(x[:31], weight, ONES, 1)
    assert not serves(x.repeat(1, 1, 1, 2), weight, ONES, 1)
    assert not serves(x, weight[:256], ONES, 1)
    assert not serves(x, weight[..., :1, :1], ONES, 1)
    assert not serves(x, weight, ((2, 2), (1, 1), (1, 1)), 1)
    assert not serves(x, weight, ((1, 1), (0, 0), (1, 1)), 1)
    assert not serves(x, weight, ONES, 2)


@needs_bf16
def test_a_twin_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolution, skip and ReLU in place behind it, refresh, and no further from the model than oneDNN's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(512, 512, 3, padding=1)
            self.norm = nn.BatchNorm2d(512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.norm(self.conv(x)) + x)

    model, x = Block().eval(), torch.randn(32, 512, 4, 4)
    precision = Precision(torch.device("cpu"), torch.float32, torch.channels_last, oracle=False)
    twin = TwinNet(model, precision, x, torch.bfloat16)
    with torch.no_grad():
        model.conv.weight.mul_(1.5)
    twin.refresh()

    def passes() -> tuple[torch.Tensor, torch.Tensor]:
        return twin.logits(x).float(), twin.input_grad(x, torch.ones_like).float()

    called = []
    monkeypatch.setattr(small_maps, "convolve", _counted(small_maps.convolve, called))
    mine = passes()
    assert len(called) == 3
    (layer,) = twin.layers
    assert isinstance(layer, FoldedConv)
    monkeypatch.setattr(small_maps, "LARGEST", 0)
    theirs = passes()
    assert len(called) == 3
    exact = model(x.requires_grad_())
    expected = exact.detach(), torch.autograd.grad(exact, x, torch.ones_like(exact))[0]
    for a, b, c in zip(mine, theirs, expected, strict=True):
        assert (a - c).norm() <= 1.1 * (b - c).norm()
        assert (b - c).norm() <= 0.05 * c.norm()  # a ReLU near zero may take the other side


def _counted(function: object, called: list[int]) -> object:
    def counting(*arguments: object) -> object:
        called.append(1)
        return function(*arguments)  # type: ignore[operator]

    return counting
