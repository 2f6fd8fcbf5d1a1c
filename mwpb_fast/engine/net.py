"""A model as an attack sees it: logits without a graph, and the gradient of its input alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mwpb_fast.engine.precision import Precision
from mwpb_fast.method import DLogits, Net


class EagerNet(Net):
    """The model itself, run eagerly: the oracle of any faster engine, and what serves every model.

    Only the input's gradient is asked of autograd, so no weight gradient is computed. Modules keep whatever
    mode they are in; `module_mode` sets it.
    """

    def __init__(self, model: torch.nn.Module, precision: Precision) -> None:
        self.model = model
        self.precision = precision

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.precision.autocast():
            return self.model(x)

    def input_grad(self, x: torch.Tensor, dlogits: DLogits) -> torch.Tensor:
        with torch.enable_grad(), self.precision.autocast():
            leaf = x.detach().requires_grad_()
            logits = self.model(leaf)
        (gradient,) = torch.autograd.grad(logits, leaf, dlogits(logits.detach()))
        return gradient

    def refresh(self) -> None:
        """Nothing to do: it is the model itself."""


@contextlib.contextmanager
def untracked(model: torch.nn.Module) -> Iterator[None]:
    """Batch norms in train mode leave their running statistics alone inside the block."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    tracking = [norm for norm in norms if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


@contextlib.contextmanager
def crafting(model: torch.nn.Module, mode: str) -> Iterator[None]:
    """The model as margins and attacks are to see it: "eval"; "train", batch statistics that move the running
    ones; "batch", batch statistics that do not."""
    with module_mode(model, training=mode != "eval"), contextlib.ExitStack() as stack:
        if mode == "batch":
            stack.enter_context(untracked(model))
        yield


@contextlib.contextmanager
def module_mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """Every module in train or eval mode inside the block, and each as it was after it."""
    modules = list(model.modules())
    before = [module.training for module in modules]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode
