"""RobustBench's classes as far as loading goes: the names of their parts, and what their forward passes do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        other = stride != 1 or inputs != width
        parts = (conv(inputs, width, 1, stride), nn.BatchNorm2d(width)) if other else ()
        self.shortcut = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class PreActBlockV2(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3, 1, 1)
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(conv(inputs, width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = self.shortcut(out) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + skip


def stages(block: type[nn.Module], counts: list[int]) -> list[nn.Sequential]:
    made, inputs = [], 64
    for i, count in enumerate(counts):
        width, parts = 64 * 2**i, []
        for j in range(count):
            parts.append(block(inputs, width, 2 if i and j == 0 else 1))
            inputs = width
        made.append(nn.Sequential(*parts))
    return made


class ResNet(nn.Module):
    def __init__(self, block: type[nn.Module], num_blocks: list[int], num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3, 1, 1), nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(block, num_blocks)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


class PreActResNet(nn.Module):
    def __init__(
        self, block: type[nn.Module], num_blocks: list[int], num_classes: int = 10, bn_before_fc: bool = False
    ) -> None:
        super().__init__()
        assert bn_before_fc
        self.conv1 = conv(3, 64, 3, 1, 1)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(block, num_blocks)
        self.bn, self.linear = nn.BatchNorm2d(512), nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.avg_pool2d(F.relu(self.bn(out)), 4).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3, 1, 1)
        self.convShortcut = conv(inputs, width, 1, stride) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = self.convShortcut(out) if self.convShortcut else x
        return skip + self.conv2(F.relu(self.bn2(self.conv1(out))))


class Group(nn.Module):
    """Blocks under another name: `layer` of wide_resnet, `block` of dm_wide_resnet."""

    def __init__(
        self, name: str, block: type[nn.Module], count: int, inputs: int, width: int, stride: int
    ) -> None:
        super().__init__()
        parts = [block(inputs if j == 0 else width, width, stride if j == 0 else 1) for j in range(count)]
        self.add_module(name, nn.Sequential(*parts))

    def forward(self, x: Tensor) -> Tensor:
        (inner,) = self.children()
        return inner(x)


class WideResNet(nn.Module):
    def __init__(self, depth: int = 28, num_classes: int = 10, widen_factor: int = 10) -> None:
        super().__init__()
        count, w = (depth - 4) // 6, 16 * widen_factor
        self.conv1 = conv(3, 16, 3, 1, 1)
        self.block1 = Group("layer", WideBlock, count, 16, w, 1)
        self.block2 = Group("layer", WideBlock, count, w, 2 * w, 2)
        self.block3 = Group("layer", WideBlock, count, 2 * w, 4 * w, 2)
        self.bn1, self.fc = nn.BatchNorm2d(4 * w), nn.Linear(4 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.avg_pool2d(F.relu(self.bn1(out)), 8).flatten(1))


class Swish(nn.SiLU):
    pass


class DMBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0, self.conv_0 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.batchnorm_1, self.conv_1 = nn.BatchNorm2d(width), conv(width, width, 3, 1, 1)
        self.shortcut = conv(inputs, width, 1, stride) if inputs != width else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.batchnorm_0(x))
        skip = self.shortcut(out) if self.shortcut else x
        out = F.pad(out, (1, 1, 1, 1) if self.stride == 1 else (0, 1, 0, 1))
        return skip + self.conv_1(F.silu(self.batchnorm_1(self.conv_0(out))))


class DMWideResNet(nn.Module):
    def __init__(
        self, num_classes: int = 10, depth: int = 28, width: int = 10, activation_fn: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        assert activation_fn is Swish
        self.register_buffer("mean", torch.full((3, 1, 1), 0.47))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))
        count, w = (depth - 4) // 6, 16 * width
        self.init_conv = conv(3, 16, 3, 1, 1)
        plan = ((16, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2))
        self.layer = nn.Sequential(*(Group("block", DMBlock, count, *one) for one in plan))
        self.batchnorm, self.logits = nn.BatchNorm2d(4 * w), nn.Linear(4 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.init_conv((x - self.mean) / self.std))
        return self.logits(F.avg_pool2d(F.silu(self.batchnorm(out)), 8).flatten(1))
