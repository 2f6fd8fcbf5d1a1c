"""The attacks of an evaluation, by name. Another one is another entry of NAMED or FAMILIES.

natural: none. pgdK, cwK: K steps from a uniform start, on the cross-entropy and on the Carlini-Wagner margin;
pgdKxR: the worst of R starts. fgsm: one step of size eps from the image. aa, aa-l2: standard AutoAttack; aa-rand,
aa-rand-l2: its version for randomised models; apgd-ce, apgd-t, fab, square: the standard's parts alone. spsaP:
SPSA of P pairs an iteration; spsa is spsa256. pgdK-l2, cwK-l2: in the l2 ball. pgdK-weighted, pgdK-reversed: in
radii of mean eps, see `by_margin`. -eotP after an attack by steps: each of its gradients is the mean over P
passes. After an `@` comes the attack's own radius, then, after a colon, its own step size: pgd20@12/255,
pgd20@32/255:8/255; an own radius alone takes a step size that the attack has of itself along in proportion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import margin
from mwpb_fast.config import ConfigError
from mwpb_fast.config.radius import check_linf, parse_radius
from mwpb_fast.evaluation.autoattack import COMPONENTS, RAND, STANDARD, autoattack, deviations, package_version
from mwpb_fast.evaluation.contract import AttackSetting, EvaluationAttack, Outcome, check_ball, judged
from mwpb_fast.evaluation.prefilter import prefiltered
from mwpb_fast.evaluation.randomised import drawn_right
from mwpb_fast.evaluation.spsa import SPSA
from mwpb_fast.inner_losses import carlini_wagner, cross_entropy
from mwpb_fast.meant import meant
from mwpb_fast.method import Batch
from mwpb_fast.system.lazy import ops, torch

if TYPE_CHECKING:
    from mwpb_fast.method import Inner


ALPHA = 0.58  # the paper's with AT on CIFAR-10
L2 = Fraction(128, 255)


def find_attack(name: str) -> EvaluationAttack:
    """The attack of that name, with the radius and step of its suffix. Raises ConfigError, if there is none."""
    base, at, own = name.partition("@")
    attack = _named(base)
    if not at:
        return attack
    eps, colon, step = own.partition(":")
    if not attack.ball or (colon and not attack.stepped):
        raise ConfigError(f"evaluation.attacks: {name}: {base} has no {'step size' if attack.ball else 'radius'}")
    try:
        radii: dict[str, Any] = {"eps": parse_radius(eps)} | ({"step_size": parse_radius(step)} if colon else {})
        if not colon and attack.step_size is not None and attack.eps:
            radii["step_size"] = attack.step_size * radii["eps"] / attack.eps
        if attack.norm != "l2":
            for which, value in radii.items():
                check_linf(which, value)
        return replace(attack, **radii)
    except ValueError as error:
        raise ConfigError(f"evaluation.attacks: {name}: {error}") from error


def _named(base: str) -> EvaluationAttack:
    if base in NAMED:
        return NAMED[base]
    if averaged := re.fullmatch(r"(.+)-eot([2-9]|[1-9]\d{1,2})", base):
        attack, passes = _named(averaged[1]), int(averaged[2])
        if attack.stepped and attack.passes == 1:
            forwards, parameters = attack.forwards * passes, attack.parameters | {"eot": passes}
            return replace(attack, passes=passes, forwards=forwards, parameters=parameters)
    match = re.fullmatch(r"([a-z]+)([1-9]\d{0,4})(?:x([1-9]\d{0,2}))?(-[a-z0-9]+)?", base)
    family = "" if match is None else match[1] + (match[4] or "")
    if match is None or family not in MAKERS or (match[3] and family not in RESTARTED):
        number = re.match(r"[A-Za-z]+[-_]?([1-9]\d*)", base)
        known = [name.replace("20", number[1] if number else "20") for name in (*NAMED, *_numbered())]
        raise ConfigError(f"evaluation.attacks: no attack {base!r}{meant(base, known, listed=there_are())}")
    if match[3]:
        return RESTARTED[family](int(match[2]), int(match[3]))
    return MAKERS[family](int(match[2]))


def there_are() -> str:
    """The names of all attacks, for people."""
    simple, variants = _numbered()[: len(FAMILIES)], _numbered()[len(FAMILIES) :]
    return (
        f"{', '.join([*NAMED, *simple])}, with any number in place of 20, pgd20x5 for 5 starts, "
        f"{', '.join(variants)}, pgd20-eot10 for means of 10 gradients, and pgd20@6/255 for a radius of its own"
    )


def _numbered() -> list[str]:
    """The names of the attacks that have a number, with 20 as theirs."""
    return [f"{family}20{dash}{rest}" for family, dash, rest in (name.partition("-") for name in MAKERS)]


def shard_name(name: str) -> str:
    """An attack's name as it stands in file names: without the suffix, which is a part of the shards' key."""
    return name.partition("@")[0]


def natural(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting
) -> Outcome:
    """No attack."""
    predicted, _ = judged(model, x, y, index, setting, lambda net, x, y, index: x)
    return Outcome(predicted == y.cpu(), predicted=predicted, x_adv=x)


def descent(
    steps: int,
    inner: Inner,
    restarts: int = 1,
    start: Any = "uniform",
    radius_of: Callable[[Any, torch.Tensor, torch.Tensor, AttackSetting], torch.Tensor] | None = None,
    proportional: bool = False,
    **own: Any,
) -> EvaluationAttack:
    """PGD of so many steps of the setting's fixed size on the given inner loss, from each of so many starts; or
    from the image itself, in one step as long as the radius, for start "none".

    radius_of: (net, x, y, setting) -> (B,), a radius for each image in place of the setting's; the outcome then
    holds them as values["radius"]. proportional: whether its step goes with it. own: as `EvaluationAttack` has it.
    """

    def run(
        model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting
    ) -> Outcome:
        norm: Any = setting.norm
        step_size = setting.eps if start == "none" else setting.step_size
        step: dict[str, Any] = {"step_size": step_size}
        if proportional and setting.eps:
            step = {"step_ratio": step_size / setting.eps}
        attack = pgd.Config(norm=norm, steps=steps, start=start, **step).build()
        radii: list[torch.Tensor] = []

        def perturb(net: Any, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            radius = torch.full(y.shape, float(setting.eps), device=x.device)
            if radius_of is not None:
                radius = radius_of(net, x, y, setting)
                radii.append(radius.cpu())
            x_adv = attack(net, Batch(x, y, index), None, radius, inner, key)
            check_ball(x_adv, x, setting, None if radius_of is None else radius)
            return x_adv

        alive, labels, x_adv, predicted = torch.arange(len(y)), y.cpu(), x.clone(), y.cpu().clone()
        for restart in range(restarts):
            words = (restart,) if restart else ()  # the first start is that of the attack without restarts
            key = torch.tensor([ops.derive_seed(setting.seed, *words)], device=x.device)
            rest = alive.to(x.device)
            if not len(rest):
                break
            predicted[alive], x_adv[rest] = judged(model, x[rest], y[rest], index[rest], setting, perturb)
            alive = alive[predicted[alive] == labels[alive]]
        correct = torch.zeros(len(y), dtype=torch.bool)
        correct[alive] = True
        # every start has the same radii; only the first one saw all images
        values = {"radius": torch.cat(radii)[: len(y)]} if radii else {}
        values |= drawn_right(model, x_adv, y, setting)
        return Outcome(correct, values=values, predicted=predicted, x_adv=x_adv)

    forwards = restarts * (steps + 1) + (radius_of is not None)
    return EvaluationAttack(run, forwards, stepped=0 if start == "none" else steps, **own)


def in_l2(steps: int, inner: Inner, restarts: int = 1) -> EvaluationAttack:
    """`descent` in the l2 ball of 128/255, in steps of an eighth of it."""
    return descent(steps, inner, restarts, norm="l2", eps=L2, step_size=L2 / 8)


def by_margin(steps: int, form: Any) -> EvaluationAttack:
    """`descent` in radii whose mean over every batch is the setting's eps: as the margin budget weights them (form
    plain), or the other way round (reversed), the more the smaller the margin of the natural image.

    It is another threat model than a ball of eps for every image: an attacker who may spend an average budget on
    whom he likes. alpha is the same for every model, so that models can be compared.
    """
    config = margin.Config(eps=Fraction(1), alpha=ALPHA, form=form, share="rescaled")
    budget = config.build()

    def radius_of(net: Any, x: torch.Tensor, y: torch.Tensor, setting: AttackSetting) -> torch.Tensor:
        return budget(net.logits(x), y) * float(setting.eps)

    what = f"mean {{eps}}, {'reversed' if form == 'reversed' else 'weighted'} (another threat model)"
    parameters = {"alpha": ALPHA, "form": form, "share": config.share}
    return descent(
        steps, cross_entropy, radius_of=radius_of, proportional=True, per_image=what, parameters=parameters
    )


def of_autoattack(components: Sequence[str] = STANDARD, **own: Any) -> EvaluationAttack:
    """AutoAttack, or some of its components, in float32, with random draws from the setting's seed and the first
    image's index."""

    def run(
        model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting
    ) -> Outcome:
        with torch.autocast(x.device.type, enabled=False):
            result = autoattack(
                model,
                x,
                y,
                eps=float(setting.eps),
                norm=setting.norm,
                seed=ops.derive_seed(setting.seed, int(index[0])),
                batch_size=setting.batch_size,
                components=components,
                search=getattr(model, "search", None) if setting.passes == 1 else None,
                begin=getattr(model, "begin", None),
            )
        check_ball(result.x_adv, x, setting)
        after = {name: flags.cpu() for name, flags in result.after.items()}
        values = drawn_right(model, result.x_adv, y, setting)
        return Outcome(
            result.correct.cpu(),
            after,
            result.warnings,
            result.deviations,
            values,
            predicted=result.predicted.cpu(),
            x_adv=result.x_adv,
        )

    def needs(classes: int) -> dict[str, str]:
        deviations(classes, components)
        return {"pyautoattack": package_version()}

    forwards = 1 + sum(COMPONENTS[name].forwards for name in components)
    parameters = {name: COMPONENTS[name].parameters for name in components}
    gradients = any(COMPONENTS[name].gradients for name in components)
    passes = min(COMPONENTS[name].passes for name in components)
    own |= {"passes": passes, "parameters": parameters, "searches": passes == 1}
    return EvaluationAttack(run, forwards, needs, gradients, long=True, **own)


def by_samples(spsa: SPSA) -> EvaluationAttack:
    """SPSA in float32, its directions from the setting's seed and each image's index."""

    def run(
        model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, setting: AttackSetting
    ) -> Outcome:
        with torch.autocast(x.device.type, enabled=False):
            x_adv, predicted = spsa.attack(
                model, x, y, index, eps=float(setting.eps), seed=setting.seed, batch_size=setting.batch_size
            )
        check_ball(x_adv, x, setting)
        return Outcome((predicted == y).cpu(), predicted=predicted.cpu(), x_adv=x_adv)

    return EvaluationAttack(run, spsa.forwards, gradients=False, long=True, costly=True, parameters=asdict(spsa))


NAMED = {
    "natural": EvaluationAttack(natural, forwards=1, gradients=False, ball=False),
    "fgsm": descent(1, cross_entropy, start="none"),
    "aa": of_autoattack(),
    "aa-l2": of_autoattack(norm="l2", eps=L2),
    "aa-fast": prefiltered(),
    "aa-rand": of_autoattack(RAND),
    "aa-rand-l2": of_autoattack(RAND, norm="l2", eps=L2),
    "apgd-ce": of_autoattack(["apgd-ce"]),
    "apgd-t": of_autoattack(["apgd-t"]),
    "fab": of_autoattack(["fab-t"]),
    "square": of_autoattack(["square"]),
    "spsa": by_samples(SPSA()),
}
FAMILIES: dict[str, Callable[[int], EvaluationAttack]] = {
    "pgd": lambda steps: descent(steps, cross_entropy),
    "cw": lambda steps: descent(steps, carlini_wagner),
    "spsa": lambda pairs: by_samples(SPSA(pairs=pairs)),
}
VARIANTS: dict[str, Callable[[int], EvaluationAttack]] = {
    "pgd-l2": lambda steps: in_l2(steps, cross_entropy),
    "cw-l2": lambda steps: in_l2(steps, carlini_wagner),
    "pgd-weighted": lambda steps: by_margin(steps, "plain"),
    "pgd-reversed": lambda steps: by_margin(steps, "reversed"),
}
MAKERS = FAMILIES | VARIANTS
RESTARTED: dict[str, Callable[[int, int], EvaluationAttack]] = {
    "pgd": lambda steps, restarts: descent(steps, cross_entropy, restarts),
    "cw": lambda steps, restarts: descent(steps, carlini_wagner, restarts),
    "pgd-l2": lambda steps, restarts: in_l2(steps, cross_entropy, restarts),
    "cw-l2": lambda steps, restarts: in_l2(steps, carlini_wagner, restarts),
}
