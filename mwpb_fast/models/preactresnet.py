"""Pre-activation ResNet for small images (He et al. 2016, "Identity mappings in deep residual networks").

State-dict names are those of the PreActResNet18 file of the robust-overfitting and AWP code (conv1,
layer1.0.bn1, layer2.0.shortcut.0, bn, linear). Initial weights are PyTorch's defaults, as in that file.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mwpb_fast.models._counterpart import Counterpart
from mwpb_fast.models._layers import conv, network, stage

COUNTS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class PreActBlock(nn.Module):
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
        identity = stride == 1 and inputs == width
        self.shortcut = None if identity else nn.Sequential(conv(inputs, width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        return self.conv2(out) + skip


def build(depth: int, *, num_classes: int, channels: int) -> nn.Sequential:
    """PreActResNet-18 or -34: images (B, channels, H, W) -> logits (B, num_classes); else ValueError."""
    if depth not in COUNTS:
        raise ValueError(f"preactresnet has depths {', '.join(map(str, COUNTS))}, not {depth}")
    body: dict[str, nn.Module] = {"conv1": conv(channels, 64, 3)}
    features = 64
    for i, count in enumerate(COUNTS[depth]):
        body[f"layer{i + 1}"] = stage(PreActBlock, features, 64 * 2**i, count, stride=1 if i == 0 else 2)
        features = 64 * 2**i
    body |= {"bn": nn.BatchNorm2d(features), "relu": nn.ReLU()}
    return network(body, "linear", features, num_classes)


def robustbench(depth: int) -> Counterpart:
    """The class of these names in RobustBench, with the block whose projections start after BN and ReLU."""
    blocks = f"resnet.PreActBlockV2, {list(COUNTS[depth])}"
    return Counterpart("resnet", "PreActResNet", blocks + ", num_classes={num_classes}, bn_before_fc=True")
