"""ResNet for small images (He et al. 2016): 3x3 stem, no max-pool, four stages of widths 64 to 512.

State-dict names and outputs are those of the ResNet18 file that robust-training code shares (conv1, bn1,
layer1.0.conv1, layer2.0.shortcut.0, linear). Initial weights are PyTorch's defaults, as in that file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mwpb_fast.models._counterpart import Counterpart
from mwpb_fast.models._layers import Block, conv, network, stage


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip: (B, inputs, H, W) -> (B, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a skip: (B, inputs, H, W) -> (B, 4 * width, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


VARIANTS: dict[int, tuple[Block, tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


def resnet(block: Block, counts: Sequence[int], width: int, *, num_classes: int, channels: int) -> nn.Sequential:
    """`counts[i]` blocks of width `width * 2**i` in stage i; each stage but the first halves H and W."""
    stem = conv(channels, width, 3)
    body: dict[str, nn.Module] = {"conv1": stem, "bn1": nn.BatchNorm2d(width), "relu": nn.ReLU()}
    features = width
    for i, count in enumerate(counts):
        body[f"layer{i + 1}"] = stage(block, features, width * 2**i, count, stride=1 if i == 0 else 2)
        features = width * 2**i * block.expansion
    return network(body, "linear", features, num_classes)


def build(depth: int, *, num_classes: int, channels: int) -> nn.Sequential:
    """ResNet-18, -34 or -50: images (B, channels, H, W) -> logits (B, num_classes); else ValueError."""
    if depth not in VARIANTS:
        raise ValueError(f"resnet has depths {', '.join(map(str, VARIANTS))}, not {depth}")
    block, counts = VARIANTS[depth]
    return resnet(block, counts, 64, num_classes=num_classes, channels=channels)


def robustbench(depth: int) -> Counterpart:
    """The class of these names in RobustBench."""
    block, counts = VARIANTS[depth]
    kind = "BasicBlock" if block.expansion == 1 else "Bottleneck"
    return Counterpart("resnet", "ResNet", f"resnet.{kind}, {list(counts)}, num_classes={{num_classes}}")
