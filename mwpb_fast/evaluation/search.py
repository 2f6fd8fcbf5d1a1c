"""What AutoAttack searches on in place of the model: its folded twin, in float32, held to the model.

A search asks for logits and input gradients some thousand times an image, and what comes of it are images. What
they are worth is the model's own word, in full float32: it has the last one on every image that a search gives,
and those that the twin alone calls adversarial are searched for again on the model itself. On CUDA forward pass
and input gradient are replayed from recordings of a few sizes of batches, to which smaller ones are filled up.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mwpb_fast.config import ConfigError
from mwpb_fast.engine.fold import UnfoldableError
from mwpb_fast.engine.precision import tf32_convolutions
from mwpb_fast.engine.recorder import WARM_UP, Recorder, recorder_for
from mwpb_fast.engine.trial import first_line
from mwpb_fast.engine.twin import CHECKED, EngineWarning, TwinNet
from mwpb_fast.evaluation.accuracy import predicted
from mwpb_fast.evaluation.layout import faster_layout
from mwpb_fast.evaluation.watched import Watched
from mwpb_fast.system.layout import in_layout
from mwpb_fast.system.memory import none_left

PLAIN = "the model itself, full float32"
TOLERANCE = 1e-3  # of an image's logits, relative, between twin and model: float32 gives up to 1e-5
MakeRecorder = Callable[[torch.device], Recorder]


def sizes(batch: int) -> list[int]:
    """The sizes of recorded batches, ascending: powers of two, those and a half, and `batch` as the largest."""
    powers = [2**k for k in range(batch.bit_length())]
    return sorted({n for n in (*powers, *(3 * p // 2 for p in powers[1:])) if n < batch} | {batch})


class Search:
    """The twin as AutoAttack's attacks call it: images in, logits out, with the input's gradient alone.

    model: what it stands for, which counts its passes too. images: (B, C, H, W) float32, a few to hold it to the
    model. batch: how many images the attacks send at once, at most. tf32: on CUDA, whether convolutions are
    rounded to TF32 within. record: makes recorders, by default for CUDA alone. Raises UnfoldableError.

    name: what it is, for the result. refuted: how many images it has called adversarial that were not.
    """

    def __init__(
        self,
        model: Watched,
        images: torch.Tensor,
        precision: Any,
        batch: int,
        tf32: bool = False,
        record: MakeRecorder | None = None,
    ) -> None:
        self.model, self.refuted, self.lost = model, 0, ""
        self.twin = TwinNet(model.inside, precision, images, torch.float32)
        on_cuda = images.device.type == "cuda"
        self.layout = torch.channels_last
        if on_cuda and not tf32:  # TF32 is of the tensor cores, which read channels-last
            self.layout = faster_layout(_Laid(self.twin), images)
        self.record = recorder_for if record is None and on_cuda else record
        self.rounding = tf32_convolutions if tf32 else contextlib.nullcontext
        self.name = f"the folded twin, {'TF32 convolutions' if tf32 else 'full float32'}"
        self.sizes, self.turn = sizes(batch), 0
        self.recorded: dict[int, _Recorded] = {}
        self._graph: Any = None

    def holds(self, images: torch.Tensor) -> bool:
        """Whether the twin is still the model's on these images; where it is not, `lost` says why, and nothing
        more is to be asked of it. It follows the model as it is now."""
        self.lost = self.lost or self._apart(images[:CHECKED])
        if self.lost:
            self.close()
        elif self.twin.graph is not self._graph:
            self.close()
            self._graph = self.twin.graph
            _Laid(self.twin).to(memory_format=self.layout)
        return not self.lost

    def _apart(self, images: torch.Tensor) -> str:
        try:
            self.twin.refresh()
            self.twin.check(images)
        except UnfoldableError as error:
            return str(error)
        with torch.no_grad():
            theirs, ours = self.model(images), self.model(images, self.twin.graph)
        far = (ours - theirs).norm(dim=1) > TOLERANCE * theirs.norm(dim=1)
        return "its logits are not the model's" if bool((far & theirs.isfinite().all(1)).any()) else ""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) float32 of images (B, C, H, W), counted as passes of the model."""
        return self.model(x, self.logits)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The same, uncounted."""
        x = in_layout(x, self.layout)
        if self.record is None or self._recorded(x) is None:
            found: torch.Tensor = self.twin.graph(x)
            return found
        if x.requires_grad and torch.is_grad_enabled():
            given: torch.Tensor = _Replay.apply(x, self)
            return given
        return self.replay(x)

    def replay(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of x from the recording of its size; `turn` numbers what was replayed last."""
        recorded = self._recorded(x)
        assert recorded is not None
        self.turn += 1
        return recorded.logits_of(x, self.turn)

    def replay_back(self, x: torch.Tensor, dlogits: torch.Tensor, turn: int) -> torch.Tensor:
        """The gradient at x from that at its logits, which were given in that turn."""
        recorded = self._recorded(x)
        assert recorded is not None
        if recorded.turn != turn:  # another pass went over what it kept
            self.replay(x)
        return recorded.gradient_of(dlogits)

    def _recorded(self, x: torch.Tensor) -> _Recorded | None:
        size = next((size for size in self.sizes if size >= len(x)), None)
        if size is None or self.record is None:
            return None
        if size not in self.recorded:
            try:
                self._add(size, x)
            except ConfigError as error:
                self.record = None
                message = f"AutoAttack's twin runs eagerly, in full float32: {error}"
                warnings.warn(message, EngineWarning, stacklevel=2)
        return self.recorded.get(size)

    def _add(self, size: int, x: torch.Tensor) -> None:
        assert self.record is not None
        try:
            made = _Recorded(self.twin.graph, size, x.detach(), self.record, self.rounding)
        except Exception as error:
            if not none_left(error) or not self.recorded:
                raise
            made = None
        if made is None:  # what the other sizes hold makes room for it
            self.close()
            made = _Recorded(self.twin.graph, size, x.detach(), self.record, self.rounding)
        self.recorded[size] = made

    def close(self) -> None:
        """Free what was recorded."""
        while self.recorded:
            self.recorded.popitem()[1].close()

    # under the package's attacks ------------------------------------------------------------------------------
    def under(self, adversary: Any, judge: Callable[[torch.Tensor], torch.Tensor], seen: Any) -> None:
        """Let the attacks of a pyautoattack.AutoAttack search on the twin, whatever they find be judged by
        `judge`, which the package itself goes on asking. seen: the twin as the attacks are to see it."""
        for attack, call in (
            (adversary.apgd, "model"),
            (adversary.apgd_targeted, "model"),
            (adversary.fab, "predict"),
            (adversary.square, "predict"),
        ):
            setattr(attack, call, seen)
            attack.perturb = partial(self._perturbed, attack, call, attack.perturb, judge)
        if self.model.not_finite.is_cuda:
            # it cuts windows out by these numbers: on the device each would be waited for
            adversary.square.random_int = _random_int

    def _perturbed(
        self, attack: Any, call: str, perturb: Callable[..., torch.Tensor], judge: Any, x: Any, y: Any
    ) -> torch.Tensor:
        found, seen = perturb(x, y), getattr(attack, call)
        with torch.no_grad():
            refuted = ((predicted(seen(found)) != y) & (predicted(judge(found)) == y)).nonzero().flatten()
        if len(refuted):
            self.refuted += len(refuted)
            setattr(attack, call, judge)
            try:
                found[refuted] = perturb(x[refuted], y[refuted])
            finally:
                setattr(attack, call, seen)
        return found


def make_search(
    model: Watched,
    images: torch.Tensor,
    precision: Any,
    batch: int,
    tf32: bool,
    record: MakeRecorder | None = None,
) -> tuple[Search | None, str]:
    """What AutoAttack searches on, as `Search` has it; None where that is the model itself, and why, in a line."""
    if not any(True for _ in model.inside.parameters()):
        return None, "it has no weights"
    try:
        return Search(model, images, precision, batch, tf32, record), ""
    except Exception as error:  # the model's own code, traced and run, may raise anything
        if none_left(error):
            raise
        return None, first_line(error)


class _Laid(torch.nn.Module):
    """The twin's graph, whose weights take a layout as a model's do."""

    def __init__(self, twin: TwinNet) -> None:
        super().__init__()
        self.twin = twin

    def to(self, *, memory_format: torch.memory_format) -> _Laid:  # type: ignore[override]
        for layer in self.twin.layers:
            if layer.weight32.dim() == 4:
                layer.weight32 = layer.weight32.contiguous(memory_format=memory_format)
                layer.hold(layer.dtype)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.twin.graph(x)
        return logits


class _Recorded:
    """The forward pass of a batch of `size` images like x, and the way back from it, each a recording."""

    def __init__(self, graph: Any, size: int, x: torch.Tensor, record: MakeRecorder, rounding: Any) -> None:
        self.x = torch.zeros((size, *x.shape[1:]), device=x.device)
        self.x = in_layout(self.x, torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)
        self.graph, self.turn = graph, 0
        self.logits = self.dlogits = self.gradient = self.x
        self.forward, self.backward = record(x.device), record(x.device)
        with rounding(), torch.enable_grad():
            for _ in range(WARM_UP):
                self.forward.warm_up(self._both)
            self.dlogits = torch.zeros_like(self.logits)
            self.forward.capture(self._forward)
            self.backward.capture(self._backward)

    def _forward(self) -> None:
        self.leaf = self.x.detach().requires_grad_()
        self.given = self.graph(self.leaf)
        self.logits = self.given.detach()

    def _backward(self) -> None:
        (self.gradient,) = torch.autograd.grad(self.given, self.leaf, self.dlogits)

    def _both(self) -> None:
        self._forward()
        self.dlogits = torch.zeros_like(self.logits)
        self._backward()

    def logits_of(self, x: torch.Tensor, turn: int) -> torch.Tensor:
        self.x[: len(x)].copy_(x.detach())
        self.forward.replay()
        self.turn, self.count = turn, len(x)
        return self.logits[: len(x)].clone()

    def gradient_of(self, dlogits: torch.Tensor) -> torch.Tensor:
        self.dlogits[: self.count].copy_(dlogits)
        self.dlogits[self.count :].zero_()
        self.backward.replay()
        return self.gradient[: self.count].clone()

    def close(self) -> None:
        self.forward.close()
        self.backward.close()


class _Replay(torch.autograd.Function):
    """Logits from a recording; the input's gradient, from another, is its whole backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, search: Search) -> torch.Tensor:
        logits = search.replay(x)
        ctx.search, ctx.turn = search, search.turn
        ctx.save_for_backward(x)
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.search.replay_back(x, gradients[0], ctx.turn), None


def _random_int(low: int = 0, high: int = 1, shape: Any = (1,)) -> torch.Tensor:
    """As the package's, from the same draws, on the CPU."""
    return (low + (high - low) * torch.rand(shape)).long()
