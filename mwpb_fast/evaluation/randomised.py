"""Attacks on a randomised model: expectation over transformation (EOT; Athalye et al., ICML 2018).

One pass of such a model gives the gradient of one draw, which leads an attack astray; the mean over several passes
estimates the expected one. Its prediction is random too, and so is a flag: that of one draw, so that the accuracy
is that of a prediction drawn once. What share of several further draws is right, image by image, stands beside it:
its mean has less chance in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mwpb_fast.method import Net
from mwpb_fast.system.lazy import torch

if TYPE_CHECKING:
    from mwpb_fast.evaluation.contract import AttackSetting

RIGHT_SHARE = "right_share"


class Averaged(Net):
    """A Net whose input gradients are means over so many passes of another's, each of its own logits. Its logits
    are those of one pass."""

    def __init__(self, net: Net, passes: int) -> None:
        self.net, self.passes = net, passes

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.logits(x)

    def input_grad(self, x: torch.Tensor, dlogits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        total = self.net.input_grad(x, dlogits)
        for _ in range(self.passes - 1):
            total = total + self.net.input_grad(x, dlogits)
        return total / self.passes

    def refresh(self) -> None:
        self.net.refresh()


def drawn_right(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, setting: AttackSetting
) -> dict[str, torch.Tensor]:
    """As "right_share" the share of the setting's passes in which each image (B, C, H, W) is predicted as y (B,):
    (B,) float32 on the CPU; nothing where the setting has one pass."""
    from mwpb_fast.engine.net import EagerNet
    from mwpb_fast.evaluation.accuracy import right

    if setting.passes == 1:
        return {}
    net, size = EagerNet(model, setting.precision), setting.batch_size
    shares = [torch.zeros(0)]
    for images, labels in zip(x.split(size), y.split(size), strict=True):
        draws = torch.stack([right(net.logits(images), labels) for _ in range(setting.passes)])
        shares.append(draws.float().mean(0).cpu())
    return {RIGHT_SHARE: torch.cat(shares)}
