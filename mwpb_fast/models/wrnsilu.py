"""Wide ResNet with SiLU, WRN-depth-width, as in the files of "Better Diffusion Models Further Improve Adversarial
Training" (Wang et al. 2023) and of Gowal et al. (2020), whose names it has.

State-dict names: init_conv, layer.0.block.0.batchnorm_0, conv_0, batchnorm_1, conv_1, shortcut; batchnorm, logits.
A convolution with stride pads images of even size on the right and at the bottom alone. Initial weights are those
of wrn.py.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from mwpb_fast.models._counterpart import Counterpart
from mwpb_fast.models._layers import conv, network, stage

MOMENTUM = 0.01  # of the batch norms' running statistics


class SiluBlock(nn.Module):
    """BN, SiLU, 3x3 convolution, twice: (B, inputs, H, W) -> (B, width, ceil(H/stride), ceil(W/stride)).

    A projected skip starts after the first BN and SiLU; an identity skip carries the raw input.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs, momentum=MOMENTUM)
        self.stride = stride
        self.conv_0 = nn.Conv2d(inputs, width, 3, stride, padding=1 if stride == 1 else 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(width, momentum=MOMENTUM)
        self.conv_1 = conv(width, width, 3)
        self.shortcut = None if inputs == width else conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        if self.stride != 1:  # one row and column less than on the other side, where the size is even
            out = F.pad(out, (out.shape[3] % 2, 1, out.shape[2] % 2, 1))
        out = F.silu(self.batchnorm_1(self.conv_0(out)))
        return self.conv_1(out) + skip


def build(depth: int, width: int, *, num_classes: int, channels: int) -> nn.Sequential:
    """WRN-depth-width with SiLU: images (B, channels, H, W) -> logits (B, num_classes).

    Raises ValueError unless depth = 6n + 4 with n >= 1 and width >= 1.
    """
    count, remainder = divmod(depth - 4, 6)
    if count < 1 or remainder:
        raise ValueError(f"wrnsilu needs a depth of 6n + 4 (10, 16, 22, 28, 34, ...), not {depth}")
    if width < 1:
        raise ValueError(f"wrnsilu needs a width of at least 1, not {width}")
    groups: list[nn.Module] = []
    features = 16
    for i in range(3):
        outputs = 16 * width * 2**i
        block = stage(SiluBlock, features, outputs, count, stride=1 if i == 0 else 2)
        groups.append(nn.Sequential(OrderedDict(block=block)))
        features = outputs
    body: dict[str, nn.Module] = {"init_conv": conv(channels, 16, 3), "layer": nn.Sequential(*groups)}
    body |= {"batchnorm": nn.BatchNorm2d(features, momentum=MOMENTUM), "silu": nn.SiLU()}
    model = network(body, "logits", features, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def robustbench(depth: int, width: int) -> Counterpart:
    """The class of these names in RobustBench, which always normalises images."""
    numbers = f"depth={depth}, width={width}, activation_fn=dm_wide_resnet.Swish"
    return Counterpart("dm_wide_resnet", "DMWideResNet", "num_classes={num_classes}, " + numbers, ("mean", "std"))
