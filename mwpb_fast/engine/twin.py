"""The attack twin: a folded, frozen, channels-last copy of a model that gives logits and input gradients.

The twin's weights are the model's with its batch norms folded in, rounded to the attack's dtype. They follow
the model at `refresh()`, once per outer step, and serve the ten or more passes of an attack. A model or mode
that cannot be folded runs the plain path instead, and that is said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from mwpb_fast.engine.fold import UnfoldableError, fold, refresh
from mwpb_fast.engine.net import EagerNet, module_mode
from mwpb_fast.engine.precision import Precision, full_float32, unmeasured
from mwpb_fast.method import Net

CHECKED = 8  # images in the comparison with the model that every new twin must pass
TOLERANCE = 2e-2  # of it, for each image, relative: rounding gives up to 1e-3, a wrong rewrite 1


class EngineWarning(RuntimeWarning):
    """A slower path than the one asked for is taken."""


class TwinNet:
    """A Net (see engine/net.py) that runs the folded twin of `model` while the model is in eval mode.

    sample: (B, C, H, W) float32 images on the model's device, such as a training batch; a few of them are run
    through model and twin, which must agree in logits and input gradient. dtype: of convolutions and matrix
    products, precision.dtype by default; the layer that gives the logits is always float32. In train mode
    (batch statistics, dropout) calls run the model itself, with a warning once. `refresh()` must follow every
    change of the weights. Raises UnfoldableError.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        precision: Precision,
        sample: torch.Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.dtype = precision.dtype if dtype is None else dtype
        self.eager = EagerNet(model, precision)
        self._modules = list(model.modules())
        self._told = False
        few = sample[:CHECKED].detach().float().contiguous()
        with module_mode(model, training=False), unmeasured():
            self.graph, self.layers = fold(model)
            self.refresh()
            self._compare(few)
            for layer in self.layers:
                layer.lower(self.dtype)
            self.refresh()
            self._results(self, few)

    def refresh(self) -> None:
        """Fold the model's weights and statistics as they are now: in place, without a wait for the device,
        capturable in a CUDA graph."""
        refresh(self.layers)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(B, classes), float32 where the model ends in a linear layer, without a graph."""
        if self._training():
            return self.eager.logits(x)
        with torch.no_grad():
            return self.graph(x)

    def input_grad(self, x: torch.Tensor, dlogits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """As Net.input_grad; no weight gradient is computed."""
        if self._training():
            return self.eager.input_grad(x, dlogits)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self.graph(leaf)
        (gradient,) = torch.autograd.grad(logits, leaf, dlogits(logits.detach()))
        return gradient

    def _training(self) -> bool:
        if not any(module.training for module in self._modules):
            return False
        if not self._told:
            self._told = True
            message = "the attack runs in train mode, where batch norms cannot be folded: it takes the plain path"
            warnings.warn(message, EngineWarning, stacklevel=3)
        return True

    def _compare(self, x: torch.Tensor) -> None:
        """Refuse a twin whose logits or input gradient are not the model's: its code does what a trace misses."""
        with full_float32():
            theirs, ours = (self._results(net, x) for net in (_Float32(self.model), self))
        for name, expected, got in zip(("logits", "input gradient"), theirs, ours, strict=True):
            if got.shape != expected.shape:
                raise UnfoldableError(f"folded, it gives another {name}")
            allowed = TOLERANCE * expected.flatten(1).norm(dim=1) + 1e-12
            close = (got - expected).flatten(1).norm(dim=1) <= allowed
            # one ReLU whose argument rounds to the other side of zero changes the gradient of its image by several
            # per cent in a narrow model, so there half of the images serve
            needed = len(close) if name == "logits" else len(close) / 2
            if close.sum() < needed and bool(expected.isfinite().all()):
                raise UnfoldableError(f"folded, it gives another {name}")

    @staticmethod
    def _results(net: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def ramp(logits: torch.Tensor) -> torch.Tensor:
            steps = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
            return steps.to(logits.dtype).expand_as(logits).contiguous()

        try:
            return net.logits(x), net.input_grad(x, ramp)
        except Exception as error:  # the model's own code, or its rewritten form, may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnfoldableError(f"it cannot be compared with its twin ({reason})") from error


class _Float32(EagerNet):
    def __init__(self, model: torch.nn.Module) -> None:
        device = next(model.parameters()).device
        super().__init__(model, Precision(device, torch.float32, torch.channels_last, oracle=False))


def make_net(
    model: torch.nn.Module,
    precision: Precision,
    sample: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> Net:
    """The fastest Net for `model`: its twin, else the model itself with a warning that says why.

    Arguments as TwinNet's. The oracle is always the model itself.
    """
    if precision.oracle:
        return EagerNet(model, precision)
    try:
        return TwinNet(model, precision, sample, dtype)
    except UnfoldableError as error:
        message = f"the attack takes the plain path: the model cannot be folded: {error}"
        warnings.warn(message, EngineWarning, stacklevel=2)
        return EagerNet(model, precision)
