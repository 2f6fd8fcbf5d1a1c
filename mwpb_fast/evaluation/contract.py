"""What an attack of an evaluation is, what it is given and what it returns; and the checks on its images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.system.lazy import torch

if TYPE_CHECKING:
    from mwpb_fast.engine.precision import Precision

BALL_TOLERANCE = 1e-6


@dataclass(frozen=True)
class AttackSetting:
    """What an attack is run with: radius and step in the units of images, norm, seed, images at once, and how
    the model is run (AutoAttack and SPSA are always float32). passes: of the attack, see `EvaluationAttack`."""

    eps: Fraction
    step_size: Fraction
    precision: Precision
    norm: str = "linf"
    seed: int = 0
    batch_size: int = 250
    passes: int = 1


@dataclass(frozen=True)
class Outcome:
    """correct: (n,) boolean on the CPU. after: the same after each component of a composed attack. warnings and
    deviations: see AutoAttackResult. values: what else was measured, name -> (n,) numbers on the CPU. predicted:
    (n,) int64 on the CPU, the classes predicted under the attack, -1 for none; x_adv: (n, C, H, W), the images
    that were so judged; each None where it is not known. seconds: of each stage, where it has several."""

    correct: torch.Tensor
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    predicted: torch.Tensor | None = None
    x_adv: torch.Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)


AttackFunction = Callable[
    ["torch.nn.Module", "torch.Tensor", "torch.Tensor", "torch.Tensor", AttackSetting], Outcome
]


@dataclass(frozen=True)
class EvaluationAttack:
    """run(model, x, y, index, setting) -> Outcome, with a frozen model in eval mode, x (n, C, H, W) float32 in
    [0, 1], y and index (n,) int64, all on one device. forwards: images sent through the model for each image
    attacked, at most, for progress. needs(classes): versions of other packages that it uses; raises ConfigError
    where it cannot run. gradients: whether it follows the model's own. stepped: how many steps of the setting's
    size it takes, 0 where that size does not matter. long: worth several processes. costly: run on the
    evaluation's `costly_subset` unless the whole is smaller. ball: whether it moves images at all. eps, step_size,
    norm: its own, in place of the evaluation's. searches: whether it may run on what stands in for the model, see
    `search`. per_image: what its radii are called where each image has one of
    its own, {eps} for the setting's. parameters: what else is fixed about it, in plain types; recorded, and a part
    of its shards' key. passes: over how many
    of a randomised model's its gradients are means. preview: whether it only looks ahead to what another attack
    says: it is then labelled so, and not among the worst case."""

    run: AttackFunction
    forwards: int
    needs: Callable[[int], dict[str, str]] = lambda classes: {}
    gradients: bool = True
    stepped: int = 0
    long: bool = False
    costly: bool = False
    ball: bool = True
    passes: int = 1
    preview: bool = False
    eps: Fraction | None = None
    step_size: Fraction | None = None
    norm: str | None = None
    per_image: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    searches: bool = False

    def setting(self, common: AttackSetting) -> AttackSetting:
        """The evaluation's setting with what is this attack's own."""
        return replace(
            common,
            eps=common.eps if self.eps is None else self.eps,
            step_size=common.step_size if self.step_size is None else self.step_size,
            norm=self.norm or common.norm,
            passes=self.passes,
        )


def gathered(images: Any) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images and labels of a pair (x, y), or of batches (x, y) such as a loader gives; and what to note about
    them, or "". Raises EvaluationError for anything else."""
    if isinstance(images, (tuple, list)) and len(images) == 2 and torch.Tensor in map(type, images):
        return images[0], images[1], ""
    if not isinstance(images, Iterable) or isinstance(images, (torch.Tensor, str, Mapping)):
        raise EvaluationError(
            f"images must be (x, y) or a loader of batches (x, y), not {type(images).__name__}; "
            "wrap a data set in torch.utils.data.DataLoader"
        )
    xs, ys = [], []
    for batch in images:
        pair = batch[:2] if isinstance(batch, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(part, torch.Tensor) and part.dim() for part in pair):
            raise EvaluationError(
                f"a loader must give batches (x, y) of tensors, this one gave {type(batch).__name__}; wrap a data "
                "set of single images in torch.utils.data.DataLoader"
            )
        xs.append(check_images(pair[0]).cpu())
        ys.append(check_labels(pair[1], len(pair[0])))
    if len({(x.shape[1:], x.dtype) for x in xs}) > 1:
        raise EvaluationError("a loader's batches must have images of one size and type")
    if not xs:
        raise EvaluationError("there are no images: the loader gave no batch")
    x, whole = torch.cat(xs), getattr(images, "dataset", None)
    count = len(whole) if isinstance(whole, Sized) else len(x)
    note = "" if count == len(x) else f"the loader gave {len(x)} images, its data set has {count}"
    return x, torch.cat(ys), note


def check_images(x: torch.Tensor) -> torch.Tensor:
    """x with values outside [0, 1] by rounding (1e-6) clamped; uint8 in [0, 255] as it is. Raises EvaluationError
    for anything else."""
    if not isinstance(x, torch.Tensor):
        raise EvaluationError(f"images must be a tensor (N, C, H, W), not {type(x).__name__}")
    x = x.detach()
    if x.dim() != 4 or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise EvaluationError(
            f"images must be float (N, C, H, W) in [0, 1] or uint8, not {x.dtype} {tuple(x.shape)}"
        )
    if x.dtype == torch.uint8:
        return x
    if len(x):
        low, high = x.amin().item(), x.amax().item()
        if not (low >= -BALL_TOLERANCE and high <= 1 + BALL_TOLERANCE):
            raise EvaluationError(
                f"images must lie in [0, 1], these reach from {low:.6g} to {high:.6g}: "
                "normalisation belongs into the model, as its first layer"
            )
    return x.float().clamp(0, 1)


def check_labels(y: torch.Tensor, images: int) -> torch.Tensor:
    """y as (N,) int64 on the CPU. Raises EvaluationError unless there is one class number, 0 or more, for each of
    so many images."""
    if not isinstance(y, torch.Tensor):
        raise EvaluationError(f"labels must be a tensor (N,) of class numbers, not {type(y).__name__}")
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise EvaluationError(
            f"labels must be integers (N,), one class number an image, not {y.dtype} {tuple(y.shape)}"
        )
    if len(y) != images:
        raise EvaluationError(f"there are {images} images and {len(y)} labels")
    y = y.to("cpu", torch.int64)
    if len(y) and (low := int(y.min())) < 0:
        raise EvaluationError(f"a label is {low}: class numbers begin at 0")
    return y


def distances(x_adv: torch.Tensor, x: torch.Tensor, norm: str) -> torch.Tensor:
    """(B,) float64: how far each image was moved, in that norm."""
    change = (x_adv - x).flatten(1).double()
    return change.abs().amax(1) if norm == "linf" else change.norm(dim=1)


def check_ball(
    x_adv: torch.Tensor, x: torch.Tensor, setting: AttackSetting, radius: torch.Tensor | None = None
) -> None:
    """Raises EvaluationError unless every adversarial image is finite, in [0, 1] and within eps + 1e-6 of x, or
    within its own radius (B,) + 1e-6 where there is one."""
    if not len(x):
        return
    distance = distances(x_adv, x, setting.norm)
    allowed = float(setting.eps) if radius is None else radius.double()
    # written so that NaN fails
    if not bool((distance <= allowed + BALL_TOLERANCE).all()):
        limit = f"eps {setting.eps}" if radius is None else f"radii up to {radius.max().item():.6g}"
        raise EvaluationError(
            f"an attack moved an image by {distance.max().item():.6g}, with {limit}: "
            "the model's logits or gradients are not finite, or the attack is wrong"
        )
    if not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
        raise EvaluationError("an attack left [0, 1]")


def judged(
    model: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    setting: AttackSetting,
    perturb: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes that the model predicts on perturb(net, x, y, index) -> x_adv, (n,) int64 on the CPU, -1 for
    none; and x_adv. In batches. Where the setting has several passes, the net's gradients are means over them."""
    from mwpb_fast.engine.net import EagerNet
    from mwpb_fast.evaluation.accuracy import predicted
    from mwpb_fast.evaluation.randomised import Averaged

    net = EagerNet(model, setting.precision)
    seen = net if setting.passes == 1 else Averaged(net, setting.passes)
    size = setting.batch_size
    x_adv, classes = [], []
    for batch in zip(x.split(size), y.split(size), index.split(size), strict=True):
        x_adv.append(perturb(seen, *batch))
        classes.append(predicted(net.logits(x_adv[-1])))
    return torch.cat(classes).cpu(), torch.cat(x_adv)
