"""SGD with momentum, the paper's step schedule, and the average of the weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mwpb_kernels.op import triton_problem

from mwpb_fast.config import ConfigError, OptimConfig
from mwpb_fast.system.optional import Attempt, attempt

APEX_DEVICES = ("cuda",)  # those that apex's kernels run on
APEX_DTYPES = (torch.float32, torch.float16)  # its FusedSGD leaves weights of any other type as they are, silently
BUILD_APEX = "build NVIDIA's from its repository, with --cpp_ext and --cuda_ext"


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
        return _guarded(apex_fused_sgd(parameters))(parameters, **arguments)
    optimizer = torch.optim.SGD(parameters, fused=True, **arguments)
    set_learning_rate(optimizer, config.lr)
    if config.momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def heeds_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step leaves the weights alone where `optimizer.found_inf` is 1: PyTorch's fused ones do, and
    those that say so by an attribute of this name."""
    # what torch.amp's own scaler asks
    return any(getattr(optimizer, name, False) for name in ("_step_supports_amp_scaling", "heeds_found_inf"))


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


def apex_fused_sgd(parameters: list[torch.nn.Parameter]) -> Any:
    """NVIDIA apex's FusedSGD class, for these parameters. Raises ConfigError where it is missing or broken, where
    another package of that name is installed, and where it cannot step them."""
    found, cure = find_apex()
    if found.module is None:
        raise ConfigError(f"optim.fused=apex: {found.why}; {cure}, or take optim.fused=torch")
    for parameter in parameters:
        if parameter.device.type not in APEX_DEVICES or parameter.dtype not in APEX_DTYPES:
            have = f"{parameter.dtype} on the {parameter.device.type}".removeprefix("torch.")
            raise ConfigError(
                f"optim.fused=apex: its FusedSGD steps weights of float32 and float16 on CUDA, not of {have}; "
                "take optim.fused=torch"
            )
    return found.module.FusedSGD


def find_apex() -> tuple[Attempt, str]:
    """NVIDIA's `apex.optimizers`, or a clause that says why its FusedSGD is not to be had; and the cure."""
    found, kernels = attempt("apex.optimizers"), attempt("amp_C")
    if found.module is None and _other_apex():
        why = "the installed package 'apex' is not NVIDIA's (that of the package index is a Pyramid toolkit)"
        return Attempt(None, why), f"pip uninstall apex, and {BUILD_APEX}"
    if found.module is None:
        return Attempt(None, f"NVIDIA apex {found.why}", found.broken), BUILD_APEX
    if not hasattr(found.module, "FusedSGD"):
        return Attempt(None, "NVIDIA apex has no FusedSGD in this version", broken=True), BUILD_APEX
    if kernels.module is None:
        why = f"NVIDIA apex has no CUDA kernels: amp_C, its extension, {kernels.why}"
        return Attempt(None, why, broken=True), BUILD_APEX
    return found, ""


def _other_apex() -> bool:
    """Whether a package `apex` is there that has no optimizers; it need not import for that."""
    try:
        spec = find_spec("apex")
    except (Exception, SystemExit):  # what finds packages is broken itself
        return False
    if spec is None or spec.origin is None:  # none, or a mere folder of that name
        return False
    return not any((Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations or ())


def _guarded(base: Any) -> Any:
    class Guarded(base):  # apex knows nothing of found_inf, so here the host has to look
        heeds_found_inf = True

        def step(self, closure: Any = None) -> Any:
            return None if bool(getattr(self, "found_inf", 0)) else super().step(closure)

    return Guarded
