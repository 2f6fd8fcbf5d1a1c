"""What shows that an attack failed for reasons of its own, measured on its path and its gradients.

After the indicators of attack failure of Pintor et al. (NeurIPS 2022), in the form of attacks. All are taken of
the margin, the largest logit of another class less that of the label: what an attack raises, and what float32
resolves however certain the model is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.evaluation.accuracy import right
from mwpb_fast.evaluation.contract import AttackSetting, EvaluationAttack, Outcome, check_ball
from mwpb_fast.inner_losses import carlini_wagner, cross_entropy
from mwpb_fast.method import Batch
from mwpb_fast.system.lazy import ops, torch

NEAR = 100  # a step of eps / 100 is short beside the ball, and far above float32's rounding
STEPS = 20
NONE = float("nan")


def slopes() -> EvaluationAttack:
    """Of the margin's gradient at each natural image: values["slope"], what the margin changes by from
    eps / 100 against it to eps / 100 along it, as a multiple of what it promises: 1 where it is the model's own;
    values["cosine"], how much a gradient eps / 100 away agrees. NaN where a gradient is zero."""
    return EvaluationAttack(_slopes, forwards=5)


def trace() -> EvaluationAttack:
    """Of the 21 points of PGD-20, as the attack of that name goes: values["lost"], 1 where one before the last
    is classified wrong and the last is not; and of images that are right at the end, otherwise NaN:
    values["backward"], the share of the margin's movement that goes down, 1 where it never moves;
    values["late"], the share of the margin's gain that the last quarter of the steps made."""
    return EvaluationAttack(_trace, forwards=STEPS + 1, stepped=True, parameters={"steps": STEPS})


def margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B,) float64: the largest logit of another class less that of y; above 0 where the prediction is wrong."""
    logits = logits.double()
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, y[:, None])[:, 0]


def _slopes(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting
) -> Outcome:
    net, near = EagerNet(model, setting.precision), float(setting.eps) / NEAR
    key = torch.tensor([ops.derive_seed(setting.seed, 2)], device=x.device)

    def measure(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradient = net.input_grad(x, partial(carlini_wagner, clean=None, y=y))
        ahead, behind = ((x + way * near * gradient.sign()).clamp(0, 1) for way in (1, -1))
        promised = (gradient.double() * (ahead.double() - behind.double())).flatten(1).sum(1)
        measured = margin(net.logits(ahead), y) - margin(net.logits(behind), y)
        beside = ops.uniform_start(x, torch.full(y.shape, near, device=x.device), key, index)
        one, other = (
            g.double().flatten(1)
            for g in (gradient, net.input_grad(beside, partial(carlini_wagner, clean=None, y=y)))
        )
        # 0 / 0 is NaN where there is no gradient
        cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
        return right(net.logits(x), y), measured / promised, cosine

    flags, slope, cosine = _in_batches(measure, x, y, index, setting)
    return Outcome(flags, values={"slope": slope, "cosine": cosine})


def _trace(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting
) -> Outcome:
    net = EagerNet(model, setting.precision)
    attack = pgd.Config(steps=STEPS, start="uniform", step_size=setting.step_size).build()
    key = torch.tensor([ops.derive_seed(setting.seed)], device=x.device)

    def measure(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        margins: list[torch.Tensor] = []

        def inner(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
            margins.append(margin(logits, y))
            return cross_entropy(logits, clean, y)

        x_adv = attack(
            net, Batch(x, y, index), None, torch.full(y.shape, float(setting.eps), device=x.device), inner, key
        )
        check_ball(x_adv, x, setting)
        logits = net.logits(x_adv)
        climb = torch.stack([*margins, margin(logits, y)], 1)
        kept, moves, best = right(logits, y), climb.diff(dim=1), climb.cummax(1).values
        lost = kept & (climb > 0).any(1)
        total = moves.abs().sum(1)
        backward = torch.where(total > 0, moves.clamp(max=0).abs().sum(1) / total, 1.0)
        # 0 / 0 is NaN where nothing is gained
        late = (best[:, -1] - best[:, STEPS - STEPS // 4]) / (best[:, -1] - best[:, 0])
        return kept, lost.float(), torch.where(kept, backward, NONE), torch.where(kept, late, NONE)

    flags, lost, backward, late = _in_batches(measure, x, y, index, setting)
    return Outcome(flags, values={"lost": lost, "backward": backward, "late": late})


def _in_batches(
    measure: Callable[..., tuple[torch.Tensor, ...]],
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    setting: AttackSetting,
) -> list[torch.Tensor]:
    size = setting.batch_size
    parts = [measure(*batch) for batch in zip(x.split(size), y.split(size), index.split(size), strict=True)]
    return [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
