"""Wide ResNet WRN-depth-width (Zagoruyko & Komodakis 2016), without dropout.

State-dict names are those of the TRADES file (conv1, block1.layer.0.bn1, block1.layer.0.convShortcut, bn1,
fc) without its `sub_block1`, which no forward pass uses. Initial weights follow that file: convolutions
normal with variance 2 / (k * k * outputs) (He, fan-out), BN scale 1 and shift 0, classifier bias 0 and its
weight PyTorch's default.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from mwpb_fast.models._counterpart import Counterpart
from mwpb_fast.models._layers import conv, network, stage


class WideBlock(nn.Module):
    """BN, ReLU, 3x3 convolution, twice: (B, inputs, H, W) -> (B, width, H/stride, W/stride).

    A projected skip starts after the first BN and ReLU; an identity skip carries the raw input.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.convShortcut = None if inputs == width else conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        return self.conv2(out) + skip


def build(depth: int, width: int, *, num_classes: int, channels: int) -> nn.Sequential:
    """WRN-depth-width: images (B, channels, H, W) -> logits (B, num_classes).

    Raises ValueError unless depth = 6n + 4 with n >= 1 and width >= 1.
    """
    count, remainder = divmod(depth - 4, 6)
    if count < 1 or remainder:
        raise ValueError(f"wrn needs a depth of 6n + 4 (10, 16, 22, 28, 34, ...), not {depth}")
    if width < 1:
        raise ValueError(f"wrn needs a width of at least 1, not {width}")
    body: dict[str, nn.Module] = {"conv1": conv(channels, 16, 3)}
    features = 16
    for i in range(3):
        outputs = 16 * width * 2**i
        layer = stage(WideBlock, features, outputs, count, stride=1 if i == 0 else 2)
        body[f"block{i + 1}"] = nn.Sequential(OrderedDict(layer=layer))
        features = outputs
    body |= {"bn1": nn.BatchNorm2d(features), "relu": nn.ReLU()}
    model = network(body, "fc", features, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def robustbench(depth: int, width: int) -> Counterpart:
    """The class of these names in RobustBench."""
    numbers = f"depth={depth}, widen_factor={width}"
    return Counterpart("wide_resnet", "WideResNet", numbers + ", num_classes={num_classes}")
