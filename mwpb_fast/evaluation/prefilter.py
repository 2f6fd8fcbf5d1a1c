"""A preview of AutoAttack: a cheap, strong attack first, and standard AutoAttack on what withstands it.

The targets of an image are tried in the order of MALT (Melamed, Yehudai and Vardi, NeurIPS 2024): networks are
nearly linear over the size of a ball, so that the class whose boundary is nearest by the gradients at the image,
(z_y - z_j) over the norm of the difference of their gradients, is the one that is most likely reached. The norm is
dual to the ball's, as the distance to a linear boundary has it. A few steps of PGD go for each of the first
targets, on the folded twin where there is one; the model itself, in full float32, has the last word on what they
find.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mwpb_fast.evaluation.accuracy import predicted
from mwpb_fast.evaluation.autoattack import COMPONENTS, STANDARD, autoattack, cost, deviations, package_version
from mwpb_fast.evaluation.contract import AttackSetting, EvaluationAttack, Outcome, check_ball
from mwpb_fast.evaluation.course import GRADIENT
from mwpb_fast.method import Net
from mwpb_fast.system.lazy import ops, torch
from mwpb_fast.system.memory import none_left

if TYPE_CHECKING:
    from collections.abc import Callable

    from mwpb_fast.evaluation.watched import Watched
    from mwpb_fast.method import Net

CANDIDATES = 9  # classes, those of the largest logits, whose boundaries are looked at
TARGETS = 3  # of them, those of the nearest boundaries, that are tried
STEPS = 20
FIRST = 0.5  # of the radius: the first step; they become smaller by even amounts


def malt_order(net: Net, x: torch.Tensor, y: torch.Tensor, norm: str) -> torch.Tensor:
    """(B, k) int64: the other classes of images x (B, C, H, W) of classes y, up to `CANDIDATES` of the largest
    logits, the one with the nearest boundary first."""
    logits = net.logits(x).float()
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    candidates = others.topk(min(CANDIDATES, logits.shape[1] - 1)).indices
    distance = torch.empty(candidates.shape, device=x.device)
    for column, target in enumerate(candidates.T):
        slope = net.input_grad(x, towards(y, target)).flatten(1).float()
        size = slope.norm(1 if norm == "linf" else 2, dim=1).clamp_min(1e-12)
        distance[:, column] = (own - others.gather(1, target[:, None]))[:, 0] / size
    return candidates.gather(1, distance.argsort(dim=1, stable=True))


def towards(y: torch.Tensor, target: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The gradient of z_target - z_y with respect to logits (B, classes); y, target: (B,)."""

    def dlogits(logits: torch.Tensor) -> torch.Tensor:
        gradient = torch.zeros_like(logits)
        gradient.scatter_(1, y[:, None], -1.0)
        return gradient.scatter_(1, target[:, None], 1.0)

    return dlogits


def find(net: Net, x: torch.Tensor, y: torch.Tensor, eps: float, norm: str) -> torch.Tensor:
    """Images like x (B, C, H, W), which the net gets right as y (B,): adversarial for it where it was found to be
    so, else as the last target left them."""
    x_adv, alive = x.clone(), torch.arange(len(y), device=x.device)
    step = ops.linf_step_ if norm == "linf" else ops.l2_step_
    for target in malt_order(net, x, y, norm)[:, :TARGETS].T:
        natural, label, aim = x[alive], y[alive], towards(y[alive], target[alive])
        moved, radius = natural.clone(), torch.full(label.shape, eps, device=x.device)
        for number in range(STEPS):
            step(moved, net.input_grad(moved, aim), natural, radius, radius * (FIRST * (1 - number / STEPS)))
        x_adv[alive] = moved
        alive = alive[predicted(net.logits(moved)) == label]
        if not len(alive):
            break
    return x_adv


class OnTwin(Net):
    """The folded twin of a watched model as a Net that is counted and can be stopped as the model is. In bfloat16
    where the processor computes in it and the equivalence ledger holds that to the model, else in float32. Raises
    what folding raises where there is none."""

    def __init__(self, model: Watched, x: torch.Tensor, setting: AttackSetting) -> None:
        from mwpb_fast.engine.processor import cpu_has_bf16
        from mwpb_fast.engine.twin import TwinNet

        self.model = model
        half = x.device.type == "cpu" and cpu_has_bf16()
        self.net = TwinNet(model.inside, setting.precision, x, torch.bfloat16 if half else torch.float32)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        self._count(x)
        return self.net.logits(x)

    def input_grad(self, x: torch.Tensor, dlogits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        self._count(x)
        return self.net.input_grad(x, dlogits)

    def refresh(self) -> None:
        self.net.refresh()

    def _count(self, x: torch.Tensor) -> None:
        self.model.tick()
        self.model.forwards += len(x)
        self.model.last = len(x)


def fast_net(model: Watched, x: torch.Tensor, setting: AttackSetting) -> tuple[Net, str]:
    """The twin, or the model itself where it has none; and which it is."""
    from mwpb_fast.engine.net import EagerNet

    try:
        twin = OnTwin(model, x, setting)
    except Exception as error:  # the model's own code, traced and run, may raise anything
        if none_left(error):
            raise
        return EagerNet(model, setting.precision), "the model itself"
    return twin, f"its twin in {str(twin.net.dtype).removeprefix('torch.')}"


def prefiltered(components: Sequence[str] = STANDARD, **own: Any) -> EvaluationAttack:
    """The prefilter, and AutoAttack's components on the images that withstand it: a preview of AutoAttack."""

    def run(model: Any, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting) -> Outcome:
        with torch.autocast(x.device.type, enabled=False):
            return attack(model, x, y, index, setting)

    def attack(
        model: Watched, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting
    ) -> Outcome:
        started, own = time.monotonic(), GRADIENT * (CANDIDATES + TARGETS * (STEPS + 1))
        model.begin("prefilter", GRADIENT, len(x) * (own + cost(components)))
        x_adv, classes = x.clone(), predict(model, x, setting.batch_size)
        clean = classes == y
        net, which = fast_net(model, x, setting)
        for part in clean.nonzero().flatten().split(min(setting.batch_size, model.at_once or len(x))):
            found = find(net, x[part], y[part], float(setting.eps), setting.norm)
            now = predict(model, found, setting.batch_size)  # the model's own word on them
            lost = now != y[part]
            x_adv[part[lost]], classes[part[lost]] = found[lost], now[lost]
        alive, seconds = classes == y, {"prefilter": time.monotonic() - started}
        after, rest = {"clean": clean, "prefilter": alive.clone()}, alive.nonzero().flatten()
        told = [f"{which} had the prefilter: {TARGETS} targets in MALT's order, PGD-{STEPS}; a preview"]
        if len(rest):
            standard = autoattack(
                model,
                x[rest],
                y[rest],
                eps=float(setting.eps),
                norm=setting.norm,
                seed=ops.derive_seed(setting.seed, int(index[0])),
                batch_size=setting.batch_size,
                components=components,
                search=model.search,
                begin=model.begin,
            )
            x_adv[rest], classes[rest] = standard.x_adv, standard.predicted
            for name in list(standard.after)[1:]:
                alive = alive.clone()
                alive[rest] = standard.after[name]
                after[name] = alive
            seconds["standard"] = time.monotonic() - started - seconds["prefilter"]
        check_ball(x_adv, x, setting)
        return Outcome(
            (classes == y).cpu(),
            {name: flags.cpu() for name, flags in after.items()},
            standard.warnings if len(rest) else {},
            (*told, *(standard.deviations if len(rest) else ())),
            predicted=classes.cpu(),
            x_adv=x_adv,
            seconds=seconds,
        )

    def needs(classes: int) -> dict[str, str]:
        deviations(classes, components)
        return {"pyautoattack": package_version()}

    forwards = 3 + CANDIDATES + TARGETS * (STEPS + 1) + sum(COMPONENTS[name].forwards for name in components)
    parameters = {name: COMPONENTS[name].parameters for name in components}
    parameters |= {"prefilter": {"candidates": CANDIDATES, "targets": TARGETS, "steps": STEPS, "first": FIRST}}
    own |= {"preview": True, "parameters": parameters, "searches": True}
    return EvaluationAttack(run, forwards, needs, long=True, **own)


def predict(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(B,) int64: the classes that a model predicts on images (B, C, H, W), -1 for none."""
    with torch.no_grad():
        return torch.cat([predicted(model(part)) for part in x.split(batch_size)])
