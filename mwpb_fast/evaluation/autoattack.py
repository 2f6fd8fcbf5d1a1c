"""Standard AutoAttack (Croce and Hein, ICML 2020) through its authors' package, pyautoattack.

The four attacks run one after the other on the images that survive, exactly as that package's standard version
runs them; only the bookkeeping is ours: the flags after each attack, the warnings as data, and no trace left in
the process (random generators, loggers, trace function).
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mwpb_fast.config import ConfigError
from mwpb_fast.evaluation.accuracy import predicted
from mwpb_fast.evaluation.course import GRADIENT, Begin
from mwpb_fast.system.lazy import torch
from mwpb_fast.system.optional import attempt, version_of

TARGETS = 9
SQUARE_MARGIN = 0.002
FLOOR = 10.0  # how far below all other logits a class stands that the model rules out by -inf


@dataclass(frozen=True)
class Component:
    """One of the attacks. name: of the package's object. forwards: images sent through the model for an image, at
    most, with 9 targets. parameters: the version's, set on the object whatever the package's own defaults.
    gradients: whether it follows them. targeted: whether it goes for each of `TARGETS` other classes. classes: how
    many it needs. l2_side: how many pixels height and width need to have in l2. passes: over how many its
    gradients are means."""

    name: str
    forwards: int
    parameters: dict[str, Any]
    gradients: bool = True
    targeted: bool = False
    classes: int = 2
    l2_side: int = 1
    passes: int = 1

    @property
    def each(self) -> int:  # what an image sent through the model costs, as `Course` has it
        return GRADIENT if self.gradients else 1


_APGD = {"n_iter": 100, "n_restarts": 1, "thr_decr": 0.75, "eot_iter": 1}
_FAB = {"n_iter": 100, "n_restarts": 1, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9}
# rescale_schedule: stretching the schedule of the squares' sizes over the queries, as the class does by default
_SQUARE = {"n_queries": 5000, "p_init": 0.8, "rescale_schedule": False, "n_restarts": 1}
PASSES = 20
_RAND = _APGD | {"eot_iter": PASSES}  # each gradient of version "rand" is the mean over so many passes
COMPONENTS = {
    "apgd-ce": Component("apgd", 101, _APGD),
    "apgd-t": Component("apgd_targeted", TARGETS * 102, _APGD, targeted=True, classes=4),
    "fab-t": Component("fab", TARGETS * 202, _FAB, targeted=True),
    "square": Component("square", 5001, _SQUARE, gradients=False, l2_side=5),
}
STANDARD = tuple(COMPONENTS)
# of version "rand"
COMPONENTS |= {
    "apgd-ce-rand": Component("apgd", 101 * PASSES, _RAND, passes=PASSES),
    "apgd-dlr-rand": Component("apgd", 101 * PASSES, _RAND, passes=PASSES, classes=3),
}
RAND = tuple(name for name in COMPONENTS if name not in STANDARD)
_NORMS = {"linf": "Linf", "l2": "L2"}
_WARNINGS = {
    "randomized defense": "randomized",
    "probability distribution": "softmax_output",
    "zero gradient": "zero_gradients",
    "dynamic defense": "dynamic",
}


@dataclass(frozen=True)
class AutoAttackResult:
    """x_adv: like x, the adversarial image where one was found and the natural one elsewhere. predicted: (B,)
    int64, the classes predicted there, see accuracy.predicted. after: flags (B,) boolean of the images still right
    on the natural images ("clean") and after each component. warnings: kind -> message; zero gradients are counted
    over the 9 targets. deviations: from the standard version."""

    x_adv: torch.Tensor
    predicted: torch.Tensor
    after: dict[str, torch.Tensor]
    warnings: dict[str, str]
    deviations: tuple[str, ...]

    @property
    def correct(self) -> torch.Tensor:
        """(B,) boolean: right on the natural image and under all the components that were run."""
        return list(self.after.values())[-1]


def package_version() -> str:
    """The version of pyautoattack. Raises ConfigError, naming the extra, where it is missing or
    broken."""
    _package()
    return version_of("pyautoattack") or "unknown"


def deviations(num_classes: int, components: Sequence[str] = STANDARD) -> tuple[str, ...]:
    """How the attack on a model of so many classes departs from the standard. Raises ConfigError where all its
    components need more."""
    there = for_classes(num_classes, components)
    gone = [f"without {name}, whose loss needs {COMPONENTS[name].classes} classes" for name in components]
    found = [text for text, name in zip(gone, components, strict=True) if name not in there]
    if any(COMPONENTS[name].targeted for name in there) and num_classes <= TARGETS:
        found.append(f"{num_classes - 1} target class{'es' * (num_classes > 2)} instead of {TARGETS}")
    return tuple(found)


def for_classes(num_classes: int, components: Sequence[str]) -> list[str]:
    """Those of the components that exist for so many classes. Raises ConfigError where none does."""
    there = [name for name in components if COMPONENTS[name].classes <= num_classes]
    if not there:
        least = min(COMPONENTS[name].classes for name in components)
        raise ConfigError(
            f"AutoAttack's {' and '.join(components)} needs at least {least} classes, the model has "
            f"{num_classes}: leave it out of evaluation.attacks"
        )
    return there


def autoattack(
    model: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 250,
    components: Sequence[str] = STANDARD,
    search: Any = None,
    begin: Begin | None = None,
) -> AutoAttackResult:
    """Attack a batch by the components one after the other, each on what survives. Those of version "rand" go
    together, on all the images, as one stage "rand": the package draws the natural predictions anew for each call,
    and an image must not be lost to having been drawn more often than there.

    model: images (B, C, H, W) float32 to logits (B, classes) float32, in eval mode, on x's device, its weights
    frozen (FAB would otherwise gather their gradients). x: float32 in [0, 1]. y: (B,) int64. eps: radius in the
    units of x. batch_size: images at once; the random draws depend on it. FAB looks for the nearest adversarial
    image; one farther than eps away does not count, and the natural image then stands in x_adv. search: what the
    attacks run on in place of the model, see `search.Search`; every flag is the model's own word. begin: called
    with each stage, see `Course`. Raises ConfigError where pyautoattack is missing, the classes are too few or the
    images too small.
    """
    package = _package()
    side = max(COMPONENTS[name].l2_side for name in components)
    if norm == "l2" and min(x.shape[2:]) < side:
        raise ConfigError(f"AutoAttack's Square in l2 needs images of at least {side} by {side} pixels")
    x = x.contiguous()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(batch_size)])
    departures = deviations(logits.shape[1], components)
    components = for_classes(logits.shape[1], components)
    rand = set(components) <= set(RAND)
    stages = {"rand": components} if rand else {name: [name] for name in components}
    classes = predicted(logits)
    alive = classes == y
    seen = search
    if bool((logits == -math.inf).any()):
        floor = float(logits[logits.isfinite()].min()) - FLOOR
        model, seen = _floored(model, floor), _floored(search, floor)
    x_adv, after = x.clone(), {"clean": alive.clone()}
    with _contained(package, x.device) as messages:
        adversary = package.AutoAttack(
            model,
            norm=_NORMS[norm],
            eps=eps,
            seed=seed,
            version="rand" if rand else "standard",
            device=x.device,
        )
        if search is not None and search.holds(x):
            search.under(adversary, model, seen)
        targets = min(TARGETS, logits.shape[1] - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        ahead = cost(components)
        for stage, together in stages.items():
            for component in together:
                for name, value in COMPONENTS[component].parameters.items():
                    setattr(getattr(adversary, COMPONENTS[component].name), name, value)
            index = (classes >= 0 if rand else alive).nonzero().flatten()
            if begin is not None:
                begin(stage, COMPONENTS[together[0]].each, len(index) * ahead)
            ahead -= cost(together)
            if len(index):
                # the package's own loop over survivors, one attack at a time, so that each one's flags are seen
                adversary.attacks_to_run = [component.removesuffix("-rand") for component in together]
                found, labels = adversary.run_standard_evaluation(x[index], y[index], batch_size=batch_size)
                x_adv[index] = found
                classes[index] = labels
                alive[index] = labels == y[index]
                if rand:  # its own draw of the natural images is the one that they are held to
                    after["clean"][index] = alive[index] | (found != x[index]).flatten(1).any(1)
            after[stage] = alive.clone()
    found_odd = classify(messages)
    if search is not None and search.lost:
        found_odd["twin"] = f"the folded twin is not the model's: {search.lost}; the model itself was searched on"
    return AutoAttackResult(x_adv, classes, after, found_odd, departures)


def cost(components: Sequence[str]) -> int:
    """Of these components for an image that withstands them all, as `Course` has it."""
    return sum(COMPONENTS[name].each * COMPONENTS[name].forwards for name in components)


def classify(messages: Sequence[str]) -> dict[str, str]:
    """Warnings of pyautoattack by kind: randomized, softmax_output, zero_gradients, dynamic or other."""
    found: dict[str, str] = {}
    zeros = 0
    for message in messages:
        kind = next((kind for text, kind in _WARNINGS.items() if text in message), "other")
        if kind == "zero_gradients" and (count := re.search(r"\d+", message)):
            zeros += int(count[0])
            message = f"{zeros} starting points of the targeted attack have zero gradient"
        found[kind] = message.partition(" See ")[0].strip()
    return found


def square_warning(after: dict[str, float]) -> dict[str, str]:
    """AutoAttack's last check, from accuracies in [0, 1] over the whole set: the black-box attack should find
    next to nothing (0.2 %) that the gradient attacks did not."""
    if not {"square", "fab-t"} <= after.keys() or after["square"] >= after["fab-t"] - SQUARE_MARGIN:
        return {}
    drop = 100 * (after["fab-t"] - after["square"])
    return {"square": f"Square, which uses no gradients, took another {drop:.2f} %: they may be masked"}


def _floored(
    model: Callable[[torch.Tensor], torch.Tensor], floor: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same predictions with numbers in place of -inf: the package's losses subtract logits from each other."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits = model(x)
        return torch.where(logits == -math.inf, floor, logits)

    return forward


def _package() -> Any:
    found = attempt("pyautoattack")
    if found.module is None:
        raise ConfigError(
            f"AutoAttack and its parts need pyautoattack, which {found.why}: {found.cure('pyautoattack', 'eval')}"
            ", or leave aa, aa-l2, aa-rand, apgd-ce, apgd-t, fab and square out of evaluation.attacks"
        )
    return found.module


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _contained(package: Any, device: torch.device) -> Iterator[list[str]]:
    """Collects the package's warnings, and undoes what it does to the process."""
    logger, collect = logging.getLogger("auto-attack"), _Collect()
    before = (logger.level, logger.propagate, logger.disabled, logger.handlers[:])
    checks: Any = sys.modules[f"{package.__name__}.checks"]
    original = checks.check_dynamic
    manager = logging.root.manager
    silenced = manager.disable

    def check_dynamic(*args: Any, **kwargs: Any) -> None:
        # it counts calls in a module global and leaves no trace function behind, not even a debugger's
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        trace = sys.gettrace()
        try:
            original(*args, **kwargs)
        finally:
            sys.settrace(trace)

    logger.handlers = [collect]
    logger.propagate, logger.disabled = False, False
    logger.setLevel(logging.WARNING)
    logging.disable(logging.NOTSET)
    checks.check_dynamic = check_dynamic
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield collect.messages
    finally:
        checks.check_dynamic = original
        logging.disable(silenced)
        logger.setLevel(before[0])
        logger.propagate, logger.disabled, logger.handlers = before[1:]
