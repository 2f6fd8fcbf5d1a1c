"""Adversarial weight perturbation around any objective (Wu, Xia and Wang, NeurIPS 2020)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mwpb_fast.method import Perturbation, PerturbationConfig
from mwpb_fast.perturbations.none import Nothing
from mwpb_fast.system import ranks
from mwpb_fast.system.lazy import ops, torch

# The direction alone counts, so the loss may be scaled: the gradients of a mean over the batch come near the
# smallest numbers of fp16. A power of two changes no digit of fp32 and bf16.
LOSS_SCALE = 1024.0


@dataclass(frozen=True, kw_only=True)
class Config(PerturbationConfig):
    """gamma: length of the perturbation as a share of each weight tensor's own (.01 for AT, .005 for TRADES, both
    the authors'). warmup_epochs: so many first epochs without it (none; 10 for TRADES-AWP, 5 for AT-AWP on
    SVHN)."""

    gamma: float = 0.01
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma must lie in (0, 1), not {self.gamma}; perturbation none is gamma 0")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, not {self.warmup_epochs}")

    def build(self) -> AWP:
        return AWP(self)


@dataclass(frozen=True)
class AWP(Perturbation):
    """perturb(model, loss) -> a context manager in which every weight tensor w stands at w + v.

    v = gamma * ||w|| * d / (||d|| + 1e-20) with d the gradient of the outer loss at w: one step of ascent, from
    the model in train mode with its running statistics left alone. The tensors are the convolution and linear
    kernels, known by more than one dimension and "weight" in their name. Leaving the block subtracts v from
    whatever the optimiser made of w + v, so momentum and weight decay act at the perturbed point; (w + v) - v is
    w up to one rounding where no step was taken. A gradient that is not finite perturbs nothing.

    The authors take d from one SGD step of a copy of the model; its learning rate cancels. Their TRADES script
    counts epochs from 1 and perturbs from epoch 10 on, so its warm-up of 10 lasts nine epochs; here it lasts ten.

    Speed: one more forward and backward pass of the outer loss a step. The attack sees the weights unperturbed, so
    twin and bf16 apply; nothing waits for the device, and a CUDA graph can hold it after one step outside.
    """

    config: Config

    def in_epoch(self, epoch: int) -> Perturbation:
        """What serves in the `epoch`th epoch, counted from 1."""
        return self if epoch > self.config.warmup_epochs else Nothing()

    @contextlib.contextmanager
    def __call__(self, model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Iterator[None]:
        """model: in train mode. loss: the outer loss at the weights as they are, a scalar."""
        from mwpb_fast.engine.net import untracked

        with torch.enable_grad(), untracked(model):
            weights = [w for name, w in model.named_parameters() if is_kernel(name, w)]
            gradients = torch.autograd.grad(loss() * LOSS_SCALE, weights, allow_unused=True)
        used = [(w, d) for w, d in zip(weights, gradients, strict=True) if d is not None]
        kernels = [w for w, _ in used]
        ranks.mean_([d for _, d in used])  # the direction is that of the whole batch's loss
        finite = torch.isfinite(torch.nn.utils.get_total_norm([d for _, d in used]))
        # a NaN in v could not be subtracted again
        directions = [torch.where(finite, d, 0.0) for _, d in used]
        moved = ops.awp_perturb_(kernels, directions, self.config.gamma)
        try:
            yield
        finally:
            ops.awp_restore_(kernels, moved)


def is_kernel(name: str, parameter: torch.Tensor) -> bool:
    """Whether a model's parameter is a convolution or linear kernel that trains."""
    return parameter.dim() > 1 and "weight" in name and parameter.requires_grad
