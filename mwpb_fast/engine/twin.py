"""The attack twin: a folded, frozen, channels-last copy of a model that gives logits and input gradients.

The twin's weights are the model's with its batch norms folded in, rounded to the attack's dtype. They follow
the model at `refresh()`, once per outer step, and serve the ten or more passes of an attack. A model or mode
that cannot be folded runs the plain path instead, and that is said once.
"""

from __future__ import annotations

import warnings

import torch
from torch import fx

from mwpb_fast.engine.by_hand import ByHand
from mwpb_fast.engine.fold import UnfoldableError, fold, refresh
from mwpb_fast.engine.layers import Folded
from mwpb_fast.engine.made_of import MadeOf
from mwpb_fast.engine.net import EagerNet, module_mode
from mwpb_fast.engine.precision import Precision, full_float32, unmeasured
from mwpb_fast.method import DLogits, Net

CHECKED = 8  # images in the comparison with the model that every new twin must pass
# How the twin's gradient is computed: by autograd; as engine/by_hand.py has it; and so with one kernel for a
# convolution and what follows it, with kernels for the layer that reads the image, or with both. These are made
# for CUDA alone.
PLAIN, BY_HAND, ONE_KERNEL = "plain", "by_hand", "one_kernel"
BY_HAND_STEM, ONE_KERNEL_STEM = "by_hand_stem", "one_kernel_stem"
WAYS: dict[str, dict[str, bool]] = {
    BY_HAND: {},
    ONE_KERNEL: {"one_kernel": True},
    BY_HAND_STEM: {"stem": True},
    ONE_KERNEL_STEM: {"one_kernel": True, "stem": True},
}
VARIANTS = (PLAIN, *WAYS)
TOLERANCE = 2e-2  # of it, for each image, relative: rounding gives up to 1e-3, a wrong rewrite 1


class EngineWarning(RuntimeWarning):
    """A slower path than the one asked for is taken."""


class TwinNet(Net):
    """A Net (see engine/net.py) that runs the folded twin of `model` while the model is in eval mode.

    sample: (B, C, H, W) float32 images on the model's device, such as a training batch; a few of them are run
    through model and twin, which must agree in logits and input gradient. dtype: of convolutions and matrix
    products, precision.dtype by default; the layer that gives the logits is always float32. variant: one of
    VARIANTS, which agree within rounding. In train mode (batch statistics, dropout) calls run the model itself,
    with a warning once. `refresh()` must follow every change of the model: of weights, which it folds anew, and of
    what the twin was made from, its modules and their plain attributes, where it makes the twin anew. Raises
    UnfoldableError.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        precision: Precision,
        sample: torch.Tensor,
        dtype: torch.dtype | None = None,
        variant: str = PLAIN,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"no variant {variant!r} of the twin; there are {', '.join(VARIANTS)}")
        self.model = model
        self.dtype = precision.dtype if dtype is None else dtype
        self.eager = EagerNet(model, precision)
        self.variant = variant
        self.graph: fx.GraphModule
        self.layers: list[Folded]
        self._told = self._lost = False
        self._few = sample[:CHECKED].detach().float().contiguous().clone()
        self._idle: set[tuple[str, str]] = set()
        self._made_of: MadeOf
        self._make()

    def refresh(self) -> None:
        """Fold the model's weights and statistics as they are now: in place, without a wait for the device,
        capturable in a CUDA graph. Where the model is no longer what the twin was made from, the twin is made
        anew; where that cannot be done, calls run the model itself from then on, with a warning."""
        if (now := self._made_of.differs(self._idle)) and not self._same_code(now):
            try:
                self._make()
            except UnfoldableError as error:
                self._lost, self._made_of = True, MadeOf(self.model)
                message = f"the model has changed and cannot be folded any more ({error}): it takes the plain path"
                warnings.warn(message, EngineWarning, stacklevel=2)
        self._made_of.follow(self.graph)
        self._refold()

    def _refold(self) -> None:
        refresh(self.layers)
        if self.by_hand is not None:
            self.by_hand.refresh()

    def _make(self) -> None:
        self._made_of, self._modules = MadeOf(self.model), list(self.model.modules())
        self._lost = False
        with module_mode(self.model, training=False), unmeasured():
            self.graph, self.layers = fold(self.model)
            self.by_hand = ByHand(self.graph, **WAYS[self.variant]) if self.variant in WAYS else None
            self._refold()
            self._compare(self._few)
            for layer in self.layers:
                layer.lower(self.dtype)
            self._refold()
            self._results(self, self._few)

    def _same_code(self, changed: set[tuple[str, str]]) -> bool:
        """Whether the attributes that have changed say nothing to the twin, such as a count of calls. They are
        not looked at any more."""
        if not self._made_of.harmless(changed):
            return False
        if self._lost:
            return True
        with module_mode(self.model, training=False):
            try:
                code = fold(self.model)[0].code
            except UnfoldableError:
                return False
        if code == self.graph.code:
            self._idle |= changed
        return code == self.graph.code

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(B, classes), float32 where the model ends in a linear layer, without a graph."""
        if self._lost or self._training():
            return self.eager.logits(x)
        if self.by_hand is not None:
            return self.by_hand.logits(x)
        with torch.no_grad():
            return self.graph(x)

    def input_grad(self, x: torch.Tensor, dlogits: DLogits) -> torch.Tensor:
        """As Net.input_grad; no weight gradient is computed."""
        if self._lost or self._training():
            return self.eager.input_grad(x, dlogits)
        if self.by_hand is not None:
            return self.by_hand.input_grad(x, dlogits)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self.graph(leaf)
        (gradient,) = torch.autograd.grad(logits, leaf, dlogits(logits.detach()))
        return gradient

    def linf_step_(
        self,
        x_adv: torch.Tensor,
        dlogits: DLogits,
        x: torch.Tensor,
        radius: torch.Tensor,
        step_size: torch.Tensor,
    ) -> None:
        """As Net.linf_step_."""
        if self.by_hand is None or self._lost or self._training():
            return super().linf_step_(x_adv, dlogits, x, radius, step_size)
        return self.by_hand.linf_step_(x_adv, dlogits, x, radius, step_size)

    def _training(self) -> bool:
        if not any(module.training for module in self._modules):
            return False
        if not self._told:
            self._told = True
            message = "the attack runs in train mode, where batch norms cannot be folded: it takes the plain path"
            warnings.warn(message, EngineWarning, stacklevel=3)
        return True

    def check(self, x: torch.Tensor) -> None:
        """Hold the twin, of float32, to the model on these images (B, C, H, W). Raises UnfoldableError where it is
        not the model's, or follows it no more."""
        if self._lost:
            raise UnfoldableError("the model has changed and cannot be folded any more")
        with module_mode(self.model, training=False), unmeasured():
            self._compare(x.detach().float().contiguous())

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
    variant: str = PLAIN,
) -> Net:
    """The fastest Net for `model`: its twin, else the model itself with a warning that says why.

    Arguments as TwinNet's. The oracle is always the model itself.
    """
    if precision.oracle:
        return EagerNet(model, precision)
    try:
        return TwinNet(model, precision, sample, dtype, variant)
    except UnfoldableError as error:
        message = f"the attack takes the plain path: the model cannot be folded: {error}"
        warnings.warn(message, EngineWarning, stacklevel=2)
        return EagerNet(model, precision)
