"""Batch norm with the statistics of the whole batch, of which each process has a part; on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from mwpb_fast.system import ranks


def synchronise(model: nn.Module) -> None:
    """Make every batch norm of the model one of these, in place; its tensors and their names stay."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            on_cuda = next(module.parameters(), torch.empty(0)).is_cuda
            module.__class__, module.process_group = OnCuda if on_cuda else OnCPU, None  # type: ignore[assignment]


class OnCuda(nn.SyncBatchNorm):
    """PyTorch's own, but for a process that works alone meanwhile."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if ranks.count() > 1 else _BatchNorm.forward(self, x)


class OnCPU(_BatchNorm):
    """The same for the CPU, which PyTorch's does not serve.

    Every rank has as many images as every other, so that the whole batch's mean is the mean of theirs.
    """

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, images and channels, not {tuple(input.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or ranks.count() == 1:
            return super().forward(x)
        mean, variance = self._statistics(x)
        if self.track_running_stats and self.running_mean is not None:
            self._follow(mean, variance, x.numel() // x.shape[1] * ranks.count())
        result: torch.Tensor = _Normalised.apply(x, self.weight, self.bias, mean, variance, self.eps)
        return result

    @torch.no_grad()
    def _statistics(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of each channel over the whole batch, (C,) float32 each."""
        local = torch.stack(torch.var_mean(x.float(), _others(x), correction=0))
        variances, means = ranks.whole(local[None]).unbind(1)
        return means.mean(0), variances.mean(0) + means.var(0, correction=0)

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, variance: torch.Tensor, values: int) -> None:
        """The running statistics, as PyTorch's batch norm moves them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (values / max(values - 1, 1))).to(self.running_var.dtype), share)


class _Normalised(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, the statistics being the whole batch's."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, eps: float) -> torch.Tensor:
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        return batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.dim() - 2))
        gradient, normalised = gradients[0].float(), (x.float() - mean.view(shape)) * scale.view(shape)
        of_bias = gradient.sum(_others(x))
        of_weight = (gradient * normalised).sum(_others(x))
        # Each rank's loss is a mean over its own part; averaged over the ranks, the gradient is the whole batch's.
        shared = ranks.mean(torch.stack([of_bias, of_weight])) / (x.numel() // x.shape[1])
        factor = scale if weight is None else scale * weight
        of_x = (gradient - shared[0].view(shape) - normalised * shared[1].view(shape)) * factor.view(shape)
        of_both = (None, None) if weight is None else (of_weight, of_bias)
        return of_x.to(x.dtype), *of_both, None, None, None


KINDS = (OnCPU, OnCuda)


def _others(x: torch.Tensor) -> list[int]:
    """The dimensions of x but that of its channels."""
    return [d for d in range(x.dim()) if d != 1]
