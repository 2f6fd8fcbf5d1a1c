"""What a model computes, found out on a few images before anything long is begun.

Parameters do not say what function a model is: its code, plain attributes and what it draws at random do too. So
it is run on fixed images, and what it gives there, logits and input gradients, is its fingerprint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from mwpb_fast.engine.trial import first_line
from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.evaluation.watched import Watched
from mwpb_fast.system.memory import none_left

PROBES = 4  # images of the set, and as many of noise
AGAIN = 6  # passes that a model's first one is compared with: chance may well choose the same twice
NUMBERS = 4  # projections of an image's logits, and of its gradient, in a fingerprint
# Rounding differs with the threads; another function differs by more. A ReLU whose argument rounds to the other
# side of zero changes the gradient of its image, so there half of the images serve.
SAME_LOGITS, SAME_GRADIENT = 1e-4, 1e-2
# of the size of an image's logits: more than rounding in float32, and in types of half the length
APART, APART_HALF = 5e-3, 5e-2

Fingerprint = list[list[float | None]]


@dataclass(frozen=True)
class Function:
    """fingerprint: for each probe image projections of its logits and of its input gradient, comparable by
    `same`. doubts: kind -> what makes its numbers doubtful. no_gradient: why there is none; "" where there is."""

    fingerprint: Fingerprint
    doubts: dict[str, str] = field(default_factory=dict)
    no_gradient: str = ""


def probes(x: torch.Tensor) -> torch.Tensor:
    """(n + PROBES, C, H, W): the images x (n, C, H, W), and fixed noise in [0, 1] of their shape."""
    noise = torch.rand((PROBES, *x.shape[1:]), generator=torch.Generator().manual_seed(0))
    return torch.cat((x, noise.to(x.device)))


def examine(model: Watched, x: torch.Tensor) -> Function:
    """Run the model, its weights frozen, on `probes`: alone, together, again. Where it cannot take images in its
    layout but can in the contiguous one, or gives other logits there, `model.layout` is changed. Raises
    EvaluationError where it gives no logits; random generators are left as they were."""
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        _fit_layout(model, x)
        torch.manual_seed(0)  # so that a randomised model, too, has one fingerprint
        together, gradient, no_gradient = _gradient(model, x)
        doubts = {}
        if not (no_gradient or gradient.any()):
            doubts["zero_gradients"] = (
                f"the model's gradient is zero at all of {len(x)} images that were tried (rounding, a threshold, "
                "a saturated softmax?): an attack that follows it finds nothing"
            )
        allowed = APART if model.given in (torch.float32, torch.float64) else APART_HALF
        again = (_attempt(partial(_logits, model, x)) for _ in range(AGAIN))
        if (apart := max(_apart(one, together) for one in again)) > allowed:
            doubts["randomized"] = (
                f"the model's logits differ from one pass to the next, by up to {apart:.2g} times their size: "
                "an attack that does not average over passes, as aa-rand and pgd20-eot10 do, finds too little"
            )
        else:
            alone = torch.cat([_attempt(partial(_logits, model, one)) for one in x.split(1)])
            if (apart := _apart(alone, together)) > allowed:
                doubts["batch"] = (
                    f"the model's logits for an image depend on the rest of its batch, by up to {apart:.2g} times "
                    "their size (batch norm without running statistics?): the numbers hold for this order and "
                    "batch size alone"
                )
    return Function(
        [[*a, *b] for a, b in zip(_project(together), _project(gradient), strict=True)], doubts, no_gradient
    )


def same(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of one function, but for rounding."""
    if [len(row) for row in one] != [len(row) for row in other]:
        return False
    a, b = (
        torch.tensor([[torch.nan if v is None else v for v in row] for row in rows]).double()
        for rows in (one, other)
    )
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    logits, gradients = (a - b).abs()[:, :NUMBERS], (a - b).abs()[:, NUMBERS:]
    close = (gradients <= SAME_GRADIENT * a[:, NUMBERS:].abs().amax(1, keepdim=True)).all(1)
    return bool((logits <= SAME_LOGITS * a[:, :NUMBERS].abs().max()).all()) and int(close.sum()) >= len(close) / 2


def _fit_layout(model: Watched, x: torch.Tensor) -> None:
    def runs() -> torch.Tensor:
        # a copy has the layout's own strides; those of a single image or channel may be of both layouts
        _attempt(partial(_logits, model, x[:1].clone(memory_format=model.layout)))
        return _attempt(partial(_logits, model, x.clone(memory_format=model.layout)))

    asked = model.layout
    try:
        found = runs()
        steady = _apart(runs(), found) <= APART_HALF
    except EvaluationError as error:
        model.layout = torch.contiguous_format
        try:
            runs()
        except EvaluationError:
            model.layout = asked
            raise error from None
        return
    if not steady or asked == torch.contiguous_format:
        return
    # code that reads the memory as it lies sees other images in another layout than it was written for
    model.layout = torch.contiguous_format
    with contextlib.suppress(EvaluationError):
        if _apart(runs(), found) > APART_HALF:
            return
    model.layout = asked


def _gradient(model: Watched, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Logits, the gradient of their sum weighted by a ramp, and why there is none."""
    leaf, none = x.clone().requires_grad_(), torch.zeros_like(x)
    with torch.enable_grad():
        try:
            logits = _attempt(lambda: model(leaf))
        except EvaluationError:  # inference tensors, or code of its own that is not made for gradients
            return (
                _attempt(partial(_logits, model, x)),
                none,
                "its forward pass fails where a gradient is asked for",
            )
        if not logits.requires_grad:
            return logits.detach(), none, "its logits have no gradient"
        ramp = torch.linspace(-1, 1, logits.shape[1], device=x.device).expand_as(logits)
        try:
            (gradient,) = torch.autograd.grad(logits, leaf, ramp)
        except RuntimeError as error:
            if none_left(error):
                raise
            return logits.detach(), none, first_line(error)
    return logits.detach(), gradient, ""


def _logits(model: Watched, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def _attempt(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        return call()
    except Exception as error:  # the model's own code, which may raise anything
        if isinstance(error, EvaluationError) or none_left(error):
            raise
        raise EvaluationError(f"the model cannot be evaluated: {first_line(error)}") from error


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of an image's logits, as a share of their size."""
    one, other = (t.nan_to_num(neginf=0.0, posinf=0.0).flatten(1) for t in (one, other))
    return ((one - other).norm(dim=1) / other.norm(dim=1).clamp_min(1e-12)).max().item()


def _project(values: torch.Tensor) -> Fingerprint:
    flat = values.flatten(1).double().cpu().nan_to_num(nan=7.0, posinf=1e4, neginf=-1e4)
    directions = torch.randn(flat.shape[1], NUMBERS, generator=torch.Generator().manual_seed(1)).double()
    rows: Fingerprint = (flat @ directions).tolist()
    return rows
