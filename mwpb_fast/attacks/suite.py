"""The attacks of an evaluation, by name, each as a function from images to what the model still gets right.

natural; pgdK and cwK: K steps from a uniform start, on the cross-entropy and on the Carlini-Wagner margin; aa:
standard AutoAttack. Another one is another entry of NAMED or FAMILIES.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mwpb_fast.attacks import pgd
from mwpb_fast.attacks.autoattack import autoattack, deviations, package_version
from mwpb_fast.attacks.inner import carlini_wagner, cross_entropy
from mwpb_fast.config import ConfigError
from mwpb_fast.engine.frozen import EvaluationError
from mwpb_fast.lazy import ops, torch

if TYPE_CHECKING:
    from mwpb_fast.attacks.inner import Inner
    from mwpb_fast.engine.precision import Precision

BALL_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Setting:
    """What the attacks of one evaluation share: radius and step in the units of images, norm, seed, images at
    once, and how the model is run (AutoAttack is always float32)."""

    eps: Fraction
    step_size: Fraction
    precision: Precision
    norm: str = "linf"
    seed: int = 0
    batch_size: int = 250


@dataclass(frozen=True)
class Outcome:
    """correct: (n,) boolean on the CPU. after: the same after each component of a composed attack. warnings and
    deviations: see AutoAttackResult."""

    correct: torch.Tensor
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()


Run = Callable[["torch.nn.Module", "torch.Tensor", "torch.Tensor", "torch.Tensor", Setting], Outcome]


@dataclass(frozen=True)
class Attack:
    """run(model, x, y, index, setting) -> Outcome, with a frozen model in eval mode, x (n, C, H, W) float32 in
    [0, 1], y and index (n,) int64, all on one device. passes: forward passes of a batch, at most, for progress.
    needs(classes): versions of other packages that it uses; raises ConfigError where it cannot run. stepped:
    whether the setting's step size matters. long: worth several processes."""

    run: Run
    passes: int
    needs: Callable[[int], dict[str, str]] = lambda classes: {}
    stepped: bool = False
    long: bool = False


def find_attack(name: str) -> Attack:
    """The attack of that name. Raises ConfigError, naming what there is."""
    if name in NAMED:
        return NAMED[name]
    match = re.fullmatch(r"([a-z]+)([1-9]\d{0,4})", name)
    if match is None or match[1] not in FAMILIES:
        known = ", ".join([*NAMED, *(f"{family}20" for family in FAMILIES)])
        raise ConfigError(f"evaluation.attacks: no attack {name!r}; there are {known}, with any number of steps")
    return FAMILIES[match[1]](int(match[2]))


def natural(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: Setting
) -> Outcome:
    """No attack."""
    return _over_batches(model, x, y, index, setting, lambda net, x, y, index: x)


def descent(steps: int, inner: Inner) -> Attack:
    """PGD of so many steps of the setting's fixed size, from one uniform start, on the given inner loss."""

    def run(
        model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: Setting
    ) -> Outcome:
        norm: Any = setting.norm
        attack = pgd.Config(norm=norm, steps=steps, step_size=setting.step_size, start="uniform").build()
        key = torch.tensor([ops.derive_seed(setting.seed)], device=x.device)

        def perturb(net: Any, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            radius = torch.full(y.shape, float(setting.eps), device=x.device)
            x_adv = attack(net, x, y, None, radius, inner, key, index)
            check_ball(x_adv, x, setting)
            return x_adv

        return _over_batches(model, x, y, index, setting, perturb)

    return Attack(run, passes=steps + 1, stepped=True)


def standard_autoattack(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: Setting
) -> Outcome:
    """AutoAttack in float32, its random draws from the setting's seed and the first image's index."""
    with torch.autocast(x.device.type, enabled=False):
        result = autoattack(
            model,
            x,
            y,
            eps=float(setting.eps),
            norm=setting.norm,
            seed=ops.derive_seed(setting.seed, int(index[0])),
            batch_size=setting.batch_size,
        )
    check_ball(result.x_adv, x, setting)
    after = {name: flags.cpu() for name, flags in result.after.items()}
    return Outcome(result.correct.cpu(), after, result.warnings, result.deviations)


def _autoattack_needs(classes: int) -> dict[str, str]:
    deviations(classes)
    return {"pyautoattack": package_version()}


_AUTOATTACK_PASSES = 101 + 9 * 102 + 9 * 202 + 5001  # APGD-CE, APGD-T and FAB-T with 9 targets, Square
NAMED = {
    "natural": Attack(natural, passes=1),
    "aa": Attack(standard_autoattack, passes=_AUTOATTACK_PASSES, needs=_autoattack_needs, long=True),
}
FAMILIES: dict[str, Callable[[int], Attack]] = {
    "pgd": lambda steps: descent(steps, cross_entropy),
    "cw": lambda steps: descent(steps, carlini_wagner),
}


def check_images(x: torch.Tensor) -> torch.Tensor:
    """x with values outside [0, 1] by rounding (1e-6) clamped. Raises EvaluationError where it is more."""
    if not x.is_floating_point() or x.dim() != 4:
        raise EvaluationError(f"images must be float (N, C, H, W) in [0, 1], not {x.dtype} {tuple(x.shape)}")
    if len(x):
        low, high = x.amin().item(), x.amax().item()
        if not (low >= -BALL_TOLERANCE and high <= 1 + BALL_TOLERANCE):
            raise EvaluationError(
                f"images must lie in [0, 1], these reach from {low:.6g} to {high:.6g}: "
                "normalisation belongs into the model, as its first layer"
            )
    return x.float().clamp(0, 1)


def check_ball(x_adv: torch.Tensor, x: torch.Tensor, setting: Setting) -> None:
    """Raises EvaluationError unless every adversarial image is finite, in [0, 1] and within eps + 1e-6 of x."""
    if not len(x):
        return
    change = (x_adv - x).flatten(1).double()
    distance = change.abs().amax(1) if setting.norm == "linf" else change.norm(dim=1)
    # written so that NaN fails
    if not bool((distance <= float(setting.eps) + BALL_TOLERANCE).all()):
        raise EvaluationError(
            f"an attack moved an image by {distance.max().item():.6g}, with eps {setting.eps}: "
            "the model's logits or gradients are not finite, or the attack is wrong"
        )
    if not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
        raise EvaluationError("an attack left [0, 1]")


def _over_batches(
    model: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    setting: Setting,
    perturb: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Outcome:
    from mwpb_fast.attacks.accuracy import correct
    from mwpb_fast.engine.net import EagerNet

    net = EagerNet(model, setting.precision)
    size = setting.batch_size
    batches: Iterable[Any] = zip(x.split(size), y.split(size), index.split(size), strict=True)
    return Outcome(correct(net, batches, lambda x, y, index: perturb(net, x, y, index)))
