"""SGD with momentum, the paper's step schedule, and the average of the weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from mwpb_kernels.op import triton_problem

from mwpb_fast.config import ConfigError, OptimConfig
from mwpb_fast.system.optional import attempt


def learning_rate(config: OptimConfig, epoch: int) -> float:
    """Learning rate of an epoch, counted from 1: a drop takes effect in the very epoch that `drops` names.

    With drops (80, 90): lr in epochs 1 to 79, lr / 10 in 80 to 89, lr / 100 from 90 (MWPB, section 5.1).
    """
    return config.lr * config.drop_factor ** sum(epoch >= drop for drop in config.drops)


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD over every parameter. Where `optimizer.found_inf` is 1, a step leaves the weights alone.

    PyTorch's has its learning rate as a tensor on the weights' device and its momentum allocated, so that steps
    can be captured in a graph, and the first one left out, too.
    """
    triton_problem()  # PyTorch's optimisers import Triton, and fail where it is broken and nobody has found out
    parameters = list(model.parameters())
    arguments: dict[str, Any] = dict(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.fused == "apex":
        return _guarded(apex_fused_sgd())(parameters, **arguments)
    optimizer = torch.optim.SGD(parameters, fused=True, **arguments)
    set_learning_rate(optimizer, config.lr)
    if config.momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next steps: written into its tensor where PyTorch's optimiser reads one."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if not group.get("fused"):
            group["lr"] = rate
        elif isinstance(group["lr"], torch.Tensor) and group["lr"].device == device:
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, dtype=torch.float32, device=device)


class Average:
    """Exponential moving average of a model's weights and statistics: `module`.

    After the first step it is the model as that step left it; from then on decay * average + (1 - decay) * model.
    Counts of batches are the model's own.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = copy.deepcopy(model), decay, 0
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._averaged = [(mine, its) for mine, its in pairs if mine.is_floating_point()]
        self._copied = [(mine, its) for mine, its in pairs if not mine.is_floating_point()]

    def update(self) -> None:
        """One step of the average, on the device."""
        with torch.no_grad():
            mine, its = map(list, zip(*self._averaged, strict=True))
            torch._foreach_lerp_(mine, its, 1 - self.decay)
            _copy(self._copied)

    def count(self) -> None:
        """To follow each update; the first one starts the average."""
        if not self.steps:
            _copy(self._averaged)
        self.steps += 1


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


@torch.no_grad()
def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if pairs:
        mine, its = map(list, zip(*pairs, strict=True))
        torch._foreach_copy_(mine, its)


def apex_fused_sgd() -> Any:
    """NVIDIA apex's FusedSGD class. Raises ConfigError where it is missing, or another package of that name
    is installed."""
    found = attempt("apex.optimizers")
    if found.module is not None and hasattr(found.module, "FusedSGD"):
        return found.module.FusedSGD
    if not found.broken and attempt("apex").module is not None:
        raise ConfigError(
            "optim.fused=apex: the installed package 'apex' is not NVIDIA's (the one of that name on the "
            "package index is a Pyramid toolkit); build NVIDIA's from its sources, or take optim.fused=torch"
        )
    raise ConfigError(f"optim.fused=apex: NVIDIA apex {found.why}; take optim.fused=torch")


def _guarded(base: Any) -> Any:
    class Guarded(base):  # apex knows nothing of found_inf, so here the host has to look
        def step(self, closure: Any = None) -> Any:
            return None if bool(getattr(self, "found_inf", 0)) else super().step(closure)

    return Guarded
