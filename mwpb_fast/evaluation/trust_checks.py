"""The checks of a trust report: from the results of its attacks to plain verdicts.

Attacks are compared image by image; a difference counts where it is beyond chance (McNemar's test, 5 %), and so
does a share of images that shows a fault (Wilson's interval, 95 %).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mwpb_fast.evaluation.score import NORMAL_QUANTILE, wilson
from mwpb_fast.evaluation.trust_report import in_255

STEPS = ("pgd10", "pgd20", "pgd50", "pgd100")
RESTARTS = ("pgd20", "pgd20x5")
GAP = 10.0  # points between PGD and AutoAttack: published methods that AutoAttack does not refute have 4 to 8
MUCH = 2.0  # points that more steps or starts may gain: converged PGD gains less than 1
NEARLY_ZERO = 1.0  # per cent that may be right at the largest radius
NO_GRADIENT = 1.0  # per cent of images that may have no gradient
FOUND = 95.0  # per cent of the planted examples that an attack must find (Zimmermann et al.)
ODD = 10.0  # per cent of images whose gradient or path may be odd: kinks make a few so on any network
SLOPE = (0.5, 2.0)  # of a change along the gradient to what it promises
AGREEMENT = 0.5  # cosine of the gradients at two neighbours; noise in many dimensions has 0
BACK = 1 / 3  # of an attack's movement; a walk at random goes back as much as it goes on, 1/2
LATE = 0.15  # of an attack's gain in the last quarter of its steps: 1/4 where it has not slowed down, 1/16 where
# the steps just cross a ball from a random start
NOT_FINITE, UNSTEADY = ("not_finite_logits", "not_finite_gradients"), ("batch", "randomized")  # kinds of warnings


@dataclass(frozen=True)
class Paired:
    """Two attacks on the same images. points: how much lower the accuracy is under the first. clear: whether the
    first is stronger beyond chance. only: images that fall to the first alone."""

    points: float
    clear: bool
    only: int


def compare(first: str, second: str) -> Paired:
    """Two attacks' flags, image by image."""
    one = sum(a < b for a, b in zip(first, second, strict=True))
    other = sum(a > b for a, b in zip(first, second, strict=True))
    clear = one - other > NORMAL_QUANTILE * math.sqrt(one + other)
    return Paired(100 * (one - other) / max(len(first), 1), clear, one)


class Results:
    """The results by attack, for the checks. autoattack: its flags on the same images in the run's evaluation, or
    "": they stand in where the report is without it."""

    def __init__(
        self, attacks: dict[str, Any], warnings: dict[str, Any], sweep: list[str], autoattack: str = ""
    ) -> None:
        self.attacks, self.warnings, self.sweep = attacks, warnings, sweep
        self.autoattack = attacks["aa"]["flags"] if "aa" in attacks else autoattack

    def accuracy(self, name: str) -> float:
        return self.attacks[name]["accuracy"]

    def flags(self, *names: str) -> str:
        """Right under all of these attacks that were run, and without one: an attack can also set a wrong
        prediction right."""
        flags = [self.attacks[name]["flags"] for name in (*names, "natural") if name in self.attacks]
        return "".join(map(min, zip(*flags, strict=True)))

    def values(self, name: str, what: str) -> list[float]:
        """Of each image; null, or NaN in results of earlier versions, where it has none."""
        return [v for v in self.attacks[name]["values"][what] if v is not None and math.isfinite(v)]


def _gap(results: Results) -> tuple[bool, str]:
    gap = compare(results.flags("aa"), results.flags("pgd20")).points
    return gap <= GAP, f"AutoAttack is {gap:.2f} points below PGD-20 (doubtful beyond {GAP:g})"


def _warnings(results: Results) -> tuple[bool, str]:
    warnings = results.attacks["aa"]["warnings"]
    return not warnings, "; ".join(w["message"] for w in warnings.values()) or "AutoAttack gave no warning"


def _black_box(results: Results) -> tuple[bool, str]:
    white = results.flags("pgd100", *STEPS, *RESTARTS)
    found = compare(results.flags("square"), white)
    text = (
        f"Square, which sees no gradients, leaves {results.accuracy('square'):.2f} %, PGD in all its forms "
        f"{100 * white.count('1') / len(white):.2f} %; {found.only} images fall to Square alone"
    )
    return not found.clear, text


def _single_step(results: Results) -> tuple[bool, str]:
    found = compare(results.flags("fgsm"), results.flags("pgd20"))
    fgsm, pgd20 = results.accuracy("fgsm"), results.accuracy("pgd20")
    return not found.clear, f"FGSM leaves {fgsm:.2f} %, PGD-20 {pgd20:.2f} %"


def _more(stronger: str, what: str, limit: float = MUCH) -> Callable[[Results], tuple[bool | None, str]]:
    def check(results: Results) -> tuple[bool | None, str]:
        flags, standard = results.flags(stronger), results.autoattack
        found = compare(flags, results.flags("pgd20"))
        text = f"{what} leaves {found.points:.2f} points less than PGD-20 (doubtful beyond {limit:g} and chance)"
        if not (found.clear and found.points > limit):
            return True, text
        if not standard or standard.count("1") > flags.count("1"):
            return False, text
        left = 100 * standard.count("1") / len(standard)
        return (
            None,
            f"{text}: PGD-20 alone is too weak; AutoAttack leaves {left:.2f} % of these images, and stands",
        )

    return check


def _falls(results: Results) -> tuple[bool, str]:
    last = results.attacks[results.sweep[-1]]
    low, high = last["interval"]
    text = (
        f"at eps {in_255(last['eps'])} {last['accuracy']:.2f} % are right, 95 % interval {low:.2f} to {high:.2f} "
        f"(doubtful where all of that is above {NEARLY_ZERO:g} %)"
    )
    for small, large in zip(results.sweep, results.sweep[1:], strict=False):
        if compare(results.flags(small), results.flags(large)).clear:
            eps = [in_255(results.attacks[name]["eps"]) for name in (small, large)]
            return False, f"accuracy rises from eps {eps[0]} to {eps[1]}; {text}"
    return low <= NEARLY_ZERO, text


def _zero_gradients(results: Results) -> tuple[bool, str]:
    measured = measures(results)
    share = measured["images_without_gradient"]
    text = (
        f"{share:.2f} % of the images have no gradient at all (doubtful beyond {NO_GRADIENT:g} %); "
        f"{measured['zero_gradient_share']:.2f} % of all numbers of the gradients are zero"
    )
    return share <= NO_GRADIENT, text


def _free_of(kinds: Sequence[str], otherwise: str) -> Callable[[Results], tuple[bool, str]]:
    def check(results: Results) -> tuple[bool, str]:
        found = [results.warnings[kind]["message"] for kind in kinds if kind in results.warnings]
        return not found, "; ".join(found) or otherwise

    return check


def _planted(results: Results) -> tuple[bool, str]:
    found, chance = results.values("planted", "found"), results.values("planted", "chance")
    if not found:
        return False, "the logits do not move in the ball: no example could be planted"
    high = wilson(round(sum(found)), len(found))[1]
    text = (
        f"PGD-20 finds {100 * sum(found) / len(found):.2f} % of the {len(found)} planted, as many random points "
        f"{100 * sum(chance) / len(chance):.2f} % (doubtful below {FOUND:g} % and chance)"
    )
    return 100 * high >= FOUND, text


def _rare(
    probe: str, what: str, fault: Callable[[float], bool], limit: float, text: str
) -> Callable[[Results], tuple[bool, str]]:
    """A fault that may show at so many per cent of the images where it was measured."""

    def check(results: Results) -> tuple[bool, str]:
        values = results.values(probe, what)
        if not values:
            return UNMEASURED[probe]
        bad = sum(map(fault, values))
        low = 100 * wilson(bad, len(values))[0]
        share = f"{100 * bad / len(values):.2f} % of {len(values)} images"
        return low <= limit, f"{share} {text} (doubtful beyond {limit:g} % and chance)"

    return check


def _weighted(results: Results) -> tuple[bool, str]:
    found = compare(results.flags("pgd20"), results.flags("weighted"))
    mean = 255 * measures(results)["radius"]["mean"]
    text = (
        f"PGD-20 leaves {results.accuracy('weighted'):.2f} % at the run's own radii, {mean:.2f}/255 on average, "
        f"and {results.accuracy('pgd20'):.2f} % at the uniform one"
    )
    return not found.clear, text


UNMEASURED = {
    "slopes": (False, "no image has a gradient to be measured"),
    "trace": (True, "no image that PGD-20 moves withstands it"),
}
# True: ok; False: doubtful; None: noted, as it touches a number that is not the one to be believed
CHECKS: tuple[tuple[str, tuple[str, ...], Callable[[Results], tuple[bool | None, str]]], ...] = (
    ("PGD to AutoAttack", ("pgd20", "aa"), _gap),
    ("AutoAttack's own warnings", ("aa",), _warnings),
    ("black box against white box", ("square", "pgd100"), _black_box),
    ("one step against many", ("fgsm", "pgd20"), _single_step),
    ("more steps", ("pgd20", "pgd100"), _more("pgd100", "PGD-100")),
    ("more starts", ("pgd20", "pgd20x5"), _more("pgd20x5", "the worst of five starts")),
    ("larger radii", (), _falls),  # needs the whole sweep
    ("another loss", ("cw20", "pgd20"), _more("cw20", "PGD-20 on the margin", GAP)),
    ("planted examples", ("planted",), _planted),
    ("zero gradients", ("gradients",), _zero_gradients),
    (
        "noisy gradients",
        ("slopes",),
        _rare(
            "slopes",
            "cosine",
            lambda cosine: cosine < AGREEMENT,
            ODD,
            f"have another gradient eps/100 away, with a cosine below {AGREEMENT:g}",
        ),
    ),
    (
        "gradients of another function",
        ("slopes",),
        _rare(
            "slopes",
            "slope",
            lambda slope: not SLOPE[0] <= slope <= SLOPE[1],
            ODD,
            "change along the gradient by less than half or more than twice what it promises",
        ),
    ),
    (
        "success on the way",
        ("trace",),
        _rare("trace", "lost", bool, MUCH, "are wrong at some point of PGD-20 and right at the last"),
    ),
    (
        "an attack that goes back",
        ("trace",),
        _rare(
            "trace",
            "backward",
            lambda share: share > BACK,
            ODD,
            "withstand an attack of which more than a third goes back, or which does not move",
        ),
    ),
    (
        "an attack that is not done",
        ("trace",),
        _rare(
            "trace",
            "late",
            lambda share: share > LATE,
            ODD,
            f"withstand an attack that makes over {100 * LATE:g} % of its gain in the last quarter of its steps",
        ),
    ),
    ("weighted radii against uniform", ("pgd20", "weighted"), _weighted),
    ("finite numbers", ("natural",), _free_of(NOT_FINITE, "all logits and gradients are finite")),
    (
        "normalisation",
        ("natural",),
        _free_of(("normalisation",), "nothing in the file says otherwise"),
    ),
    ("each image by itself", ("natural",), _free_of(UNSTEADY, "logits depend on no other image, nor on chance")),
)


def measures(results: Results) -> dict[str, Any]:
    radius, zero = results.values("weighted", "radius"), results.values("gradients", "zero_share")
    return {
        "radius": {"min": min(radius), "mean": math.fsum(radius) / len(radius), "max": max(radius)},
        "images_without_gradient": 100 * sum(share == 1 for share in zero) / len(zero),
        "zero_gradient_share": 100 * math.fsum(zero) / len(zero),
    }
