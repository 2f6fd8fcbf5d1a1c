"""A 3x3 convolution over few positions as matrix products that leave the padding out.

Of the nine taps of a 3x3 convolution over 4x4 positions almost a third multiply padding. Outputs that see the same
taps (corners, edges, inside) make one matrix product here, of just those taps, with one rounding, like the
convolution's own. The input's gradient is the same computation with the weights turned and transposed.

It pays where the weights are many: in bf16 on a Zen 5 CPU, 512 channels at 4x4 take two thirds of oneDNN's time
from 64 images on, and at 2x2 a third; 256 channels gain nothing, float32 loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Products are taken up to this height and width, and from so many channels and images on.
LARGEST, FEWEST_CHANNELS, FEWEST_IMAGES = 4, 512, 32


def serves(x: Tensor, weight: Tensor, geometry: Sequence[Sequence[int]], groups: int) -> bool:
    """Whether the products measured faster for x, (B, I, H, W); geometry: stride, padding and dilation."""
    return (
        weight.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and max(x.shape[2:]) <= LARGEST
        and len(x) >= FEWEST_IMAGES
        and tuple(weight.shape[2:]) == (3, 3)
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and groups == 1
        and all(tuple(numbers) == (1, 1) for numbers in geometry)
    )


Taps = tuple[int, int]  # The first and the last tap of one dimension, of 0, 1 and 2.


def taps_by_output(size: int) -> list[tuple[range, Taps]]:
    """Outputs of one dimension with the taps that they see: the first one not that before it, the last one not
    that after it."""
    if size == 1:
        return [(range(1), (1, 1))]
    found = [(range(1), (1, 2)), (range(1, size - 1), (0, 2)), (range(size - 1, size), (0, 1))]
    return [(outputs, taps) for outputs, taps in found if len(outputs)]


class Products:
    """The matrices of a weight (O, I, 3, 3) for a convolution with stride and padding 1, and for its input's
    gradient: by the taps across, (rows, 3, taps, columns). `follow()` brings them up to the weight's values."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._version = -1
        of_output, of_input = weight.shape[:2]
        self.forward, self.backward = (
            {t: weight.new_empty(rows, 3, t[1] - t[0] + 1, columns) for t in ((1, 2), (0, 2), (0, 1), (1, 1))}
            for rows, columns in ((of_output, of_input), (of_input, of_output))
        )

    @torch.no_grad()
    def follow(self) -> None:
        if self._version != self.weight._version:
            turned = self.weight.flip(2, 3).transpose(0, 1)
            for source, kept in ((self.weight, self.forward), (turned, self.backward)):
                for (first, last), matrix in kept.items():
                    matrix.copy_(source[..., first : last + 1].permute(0, 2, 3, 1))
            self._version = self.weight._version


def convolve(x: Tensor, matrices: dict[Taps, Tensor], bias: Tensor | None) -> Tensor:
    """x: (B, I, H, W). Returns (B, O, H, W), channels-last."""
    batch, channels, height, width = x.shape
    size = (batch, matrices[0, 2].shape[0], height, width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    source, target = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    for columns, (left, right) in taps_by_output(width):
        for rows, (top, bottom) in taps_by_output(height):
            matrix = matrices[left, right][:, top : bottom + 1].flatten(1).t()
            window = (len(rows), len(columns), batch, bottom - top + 1, right - left + 1, channels)
            taken = x.new_empty(window)
            for i in rows:
                for j in columns:
                    part = source[:, i + top - 1 : i + bottom, j + left - 1 : j + right]
                    taken[i - rows[0], j - columns[0]].copy_(part)
            flat = taken.view(-1, matrix.shape[0])
            result = torch.mm(flat, matrix) if bias is None else torch.addmm(bias, flat, matrix)
            result = result.view(len(rows), len(columns), batch, -1).permute(2, 0, 1, 3)
            target[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy_(result)
    return out


class Convolution(torch.autograd.Function):
    """Convolution.apply(x, products, bias) -> (B, O, H, W); the input's gradient is its whole backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Products, bias: Tensor | None) -> Tensor:
        ctx.products = products
        return convolve(x, products.forward, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return convolve(gradients[0], ctx.products.backward, None), None, None
