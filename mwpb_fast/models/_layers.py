"""What the architectures share: normalisation, bias-free convolutions, stages, the pooled classifier.

Every network is one `nn.Sequential` with named children: its modules stand in the order in which they run,
which helps batch-norm folding and tracing, and its state-dict names are the field's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std for each channel: (B, C, H, W) float -> the same shape.

    The statistics are non-persistent buffers: they follow the model's device and dtype but stay out of its
    state dict, so weights with and without normalisation have the same names.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def set_normalize(model: nn.Module, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Let the model's first layer, `normalize`, apply these statistics. Raises ValueError, one line, for unusable
    ones and for a model without such a layer."""
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"normalize needs {channels} means and deviations, not {len(mean)} and {len(std)}")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"normalize needs finite means and positive deviations, not {mean} and {std}")
    if not hasattr(model, "normalize"):
        raise ValueError("it has no `normalize` layer to set")
    model.normalize = Normalize(mean, std)


class Block(Protocol):
    """A residual block's constructor: `inputs` channels to `expansion * width`."""

    expansion: int

    def __call__(self, inputs: int, width: int, stride: int) -> nn.Module: ...


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps height and width at stride 1 (`kernel` is odd)."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def stage(block: Block, inputs: int, width: int, count: int, stride: int) -> nn.Sequential:
    """`count` residual blocks, of which the first has the stride."""
    rest = [block(width * block.expansion, width, 1) for _ in range(count - 1)]
    return nn.Sequential(block(inputs, width, stride), *rest)


def network(body: dict[str, nn.Module], classifier: str, features: int, num_classes: int) -> nn.Sequential:
    """Put the normalisation slot before `body`, and average pooling and the classifier after it.

    `body` maps state-dict names to modules and ends in (B, features, h, w) for any h, w >= 1; `classifier`
    names the linear layer. The result maps images (B, C, H, W) to logits (B, num_classes).
    """
    linear = nn.Linear(features, num_classes)
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), classifier: linear}
    return nn.Sequential(OrderedDict({"normalize": nn.Identity(), **body, **head}))
