"""A ResNet small enough to train on a CPU: 8x8 digits in seconds, 32x32 images in minutes.

Three stages of one basic block with widths W, 2W, 4W and strides 1, 2, 2; state-dict names as in resnet.py
(conv1, bn1, layer1 to layer3, linear); initial weights are PyTorch's defaults.
"""

from __future__ import annotations

from torch import nn

from mwpb_fast.models.resnet import BasicBlock, resnet


def build(width: int, *, num_classes: int, channels: int) -> nn.Sequential:
    """SmallResNet of base width `width`: images (B, channels, H, W) -> logits (B, num_classes)."""
    if width < 1:
        raise ValueError(f"smallresnet needs a width of at least 1, not {width}")
    return resnet(BasicBlock, (1, 1, 1), width, num_classes=num_classes, channels=channels)
