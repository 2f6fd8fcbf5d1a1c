"""SGD with momentum and the paper's step schedule."""

from __future__ import annotations

from typing import Any

import torch

from mwpb_fast.config import ConfigError, OptimConfig


def learning_rate(config: OptimConfig, epoch: int) -> float:
    """Learning rate of an epoch, counted from 1: a drop takes effect in the very epoch that `drops` names.

    With drops (80, 90): lr in epochs 1 to 79, lr / 10 in 80 to 89, lr / 100 from 90 (MWPB, section 5.1).
    """
    return config.lr * config.drop_factor ** sum(epoch >= drop for drop in config.drops)


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD over every parameter. Where `optimizer.found_inf` is 1, a step leaves the weights alone."""
    arguments: dict[str, Any] = dict(
        lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    if config.fused == "torch":
        return torch.optim.SGD(model.parameters(), fused=True, **arguments)
    return _guarded(apex_fused_sgd())(model.parameters(), **arguments)


def apex_fused_sgd() -> Any:
    """NVIDIA apex's FusedSGD class. Raises ConfigError where it is missing, or another package of that name
    is installed."""
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        import importlib.util

        if importlib.util.find_spec("apex") is not None:
            raise ConfigError(
                "optim.fused=apex: the installed package 'apex' is not NVIDIA's (the one of that name on the "
                "package index is a Pyramid toolkit); build NVIDIA's from its sources, or take optim.fused=torch"
            ) from error
        raise ConfigError("optim.fused=apex: NVIDIA apex is not installed; take optim.fused=torch") from error
    return FusedSGD


def _guarded(base: Any) -> Any:
    class Guarded(base):  # apex knows nothing of found_inf, so here the host has to look
        def step(self, closure: Any = None) -> Any:
            return None if bool(getattr(self, "found_inf", 0)) else super().step(closure)

    return Guarded
