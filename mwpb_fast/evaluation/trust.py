"""A checkpoint's trust report: whether its robust accuracy can be believed, in numbers and in plain verdicts.

Beside the result at the run's own, margin-weighted radii stand AutoAttack at one uniform radius, and what gives
away masked gradients (Athalye, Carlini and Wagner, ICML 2018; Carlini et al., 2019): single steps or black boxes
that beat PGD, steps or starts that keep helping, accuracy that outlives any radius, gradients that are zero.
Attacks are compared image by image; a difference counts where it is beyond chance (McNemar's test, 5 %).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mwpb_fast.config import ConfigError, EvaluationConfig
from mwpb_fast.evaluation.checkpoint import Subject, read_weights, result_path
from mwpb_fast.evaluation.evaluate import write_result
from mwpb_fast.evaluation.probes import gradients, weighted
from mwpb_fast.evaluation.request import Request
from mwpb_fast.evaluation.score import NORMAL_QUANTILE
from mwpb_fast.evaluation.trust_report import in_255, markdown
from mwpb_fast.system.files import write_atomically

STEPS = ("pgd10", "pgd20", "pgd50", "pgd100")
RESTARTS = ("pgd20", "pgd20x5")
UNEQUAL = ("pgd20-weighted", "pgd20-reversed")
FACTORS = (Fraction(3, 4), Fraction(1), Fraction(5, 4), Fraction(3, 2), *(Fraction(2**k) for k in range(1, 5)))
GAP = 10.0  # points between PGD and AutoAttack: published methods that AutoAttack does not refute have 4 to 8
MUCH = 2.0  # points that more steps or starts may gain: converged PGD gains less than 1
NEARLY_ZERO = 1.0  # per cent that may be right at the largest radius
NO_GRADIENT = 1.0  # per cent of images that may have no gradient
NOT_FINITE, UNSTEADY = ("not_finite_logits", "not_finite_gradients"), ("batch", "randomized")  # kinds of warnings


def trust_run(request: Request, *, without: Sequence[str] = (), control: Path | None = None) -> dict[str, Any]:
    """The trust report of what a request asks for; the attacks of its evaluation are not looked at.

    without: attacks to leave out, whose checks are then said not to be run. control: another run to stand beside
    it, its checkpoint evaluated before at the same radius and step. Shards finished by `evaluate_run` are taken,
    and the same call goes on after a kill. The report goes to trust-<which>.json and .md in the run folder, beside
    the file for a file. Raises what `evaluate_run` raises.
    """
    evaluation = request.evaluation or Subject(request).evaluation
    names = plan(evaluation)
    if unknown := sorted(set(without) - set(names)):
        raise ConfigError(f"no attack {unknown[0]!r} in the trust report; there are {', '.join(names)}")
    beside = None if control is None else _read_control(control, request.which, evaluation)
    named = dataclasses.replace(evaluation, attacks=tuple(name for name in names if name not in without))
    subject = Subject(dataclasses.replace(request, evaluation=named))
    result = subject.attack({"weighted": weighted(subject.config.budget), "gradients": gradients()})
    report = judge(result, evaluation)
    if beside is not None:
        split = beside["split_sha256"]
        if split not in (None, result["split_sha256"]):  # None: made by a version that did not write it
            raise ConfigError(f"{beside['path']}: was made on other test images; evaluate the control again")
        report["control"] = beside
    path = write_result(result_path(request.target, request.which, "trust"), report)
    write_atomically(Path(f"{path}.md"), (markdown(report) + "\n").encode("utf-8", "backslashreplace"))
    return report


def plan(evaluation: EvaluationConfig) -> list[str]:
    """The attacks of a report, each once; the longest last."""
    names = ["natural", "fgsm", *STEPS, *RESTARTS, *UNEQUAL, *sweep(evaluation), "square", "aa"]
    return list(dict.fromkeys(names))


def sweep(evaluation: EvaluationConfig) -> list[str]:
    """PGD-20 at rising radii, up to 16 times the evaluation's or 1. The step is the evaluation's while 20 of them
    cross three quarters of the ball, beyond that a quarter of the radius. Raises ConfigError for an eps of 0."""
    if evaluation.eps <= 0:
        raise ConfigError("a trust report needs an eps above 0")
    names = []
    for factor in FACTORS:
        eps, step = factor * evaluation.eps, evaluation.step_size
        if eps <= 1:
            own = "" if 20 * step >= Fraction(3, 2) * eps else f":{eps / 4}"
            names.append("pgd20" if factor == 1 and not own else f"pgd20@{eps}{own}")
    return names


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


def judge(result: dict[str, Any], evaluation: EvaluationConfig) -> dict[str, Any]:
    """The result of an evaluation by `plan` and the probes, with "sweep", "measures" and "verdicts" added."""
    attacks = result["attacks"]
    named = [name for name in sweep(evaluation) if name in attacks]
    results = _Results(attacks, result.get("warnings", {}), named)
    verdicts = []
    for title, needs, check in CHECKS:
        needs = needs or tuple(sweep(evaluation))
        missing = [name for name in needs if name not in attacks]
        if missing:
            verdicts.append({"check": title, "verdict": "not run", "text": f"without {', '.join(missing)}"})
            continue
        ok, text = check(results)
        verdicts.append({"check": title, "verdict": "ok" if ok else "doubt", "text": text})
    return {**result, "sweep": results.sweep, "measures": _measures(results), "verdicts": verdicts}


class _Results:
    """The results by attack, for the checks."""

    def __init__(self, attacks: dict[str, Any], warnings: dict[str, Any], sweep: list[str]) -> None:
        self.attacks, self.warnings, self.sweep = attacks, warnings, sweep

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


def _gap(results: _Results) -> tuple[bool, str]:
    gap = compare(results.flags("aa"), results.flags("pgd20")).points
    return gap <= GAP, f"AutoAttack is {gap:.2f} points below PGD-20 (doubtful beyond {GAP:g})"


def _warnings(results: _Results) -> tuple[bool, str]:
    warnings = results.attacks["aa"]["warnings"]
    return not warnings, "; ".join(w["message"] for w in warnings.values()) or "AutoAttack gave no warning"


def _black_box(results: _Results) -> tuple[bool, str]:
    white = results.flags("pgd100", *STEPS, *RESTARTS)
    found = compare(results.flags("square"), white)
    text = (
        f"Square, which sees no gradients, leaves {results.accuracy('square'):.2f} %, PGD in all its forms "
        f"{100 * white.count('1') / len(white):.2f} %; {found.only} images fall to Square alone"
    )
    return not found.clear, text


def _single_step(results: _Results) -> tuple[bool, str]:
    found = compare(results.flags("fgsm"), results.flags("pgd20"))
    fgsm, pgd20 = results.accuracy("fgsm"), results.accuracy("pgd20")
    return not found.clear, f"FGSM leaves {fgsm:.2f} %, PGD-20 {pgd20:.2f} %"


def _more(stronger: str, what: str) -> Callable[[_Results], tuple[bool, str]]:
    def check(results: _Results) -> tuple[bool, str]:
        found = compare(results.flags(stronger), results.flags("pgd20"))
        text = f"{what} leaves {found.points:.2f} points less than PGD-20 (doubtful beyond {MUCH:g} and chance)"
        return not (found.clear and found.points > MUCH), text

    return check


def _falls(results: _Results) -> tuple[bool, str]:
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


def _zero_gradients(results: _Results) -> tuple[bool, str]:
    measures = _measures(results)
    share = measures["images_without_gradient"]
    text = (
        f"{share:.2f} % of the images have no gradient at all (doubtful beyond {NO_GRADIENT:g} %); "
        f"{measures['zero_gradient_share']:.2f} % of all numbers of the gradients are zero"
    )
    return share <= NO_GRADIENT, text


def _free_of(kinds: Sequence[str], otherwise: str) -> Callable[[_Results], tuple[bool, str]]:
    def check(results: _Results) -> tuple[bool, str]:
        found = [results.warnings[kind]["message"] for kind in kinds if kind in results.warnings]
        return not found, "; ".join(found) or otherwise

    return check


def _weighted(results: _Results) -> tuple[bool, str]:
    found = compare(results.flags("pgd20"), results.flags("weighted"))
    mean = 255 * _measures(results)["radius"]["mean"]
    text = (
        f"PGD-20 leaves {results.accuracy('weighted'):.2f} % at the run's own radii, {mean:.2f}/255 on average, "
        f"and {results.accuracy('pgd20'):.2f} % at the uniform one"
    )
    return not found.clear, text


CHECKS: tuple[tuple[str, tuple[str, ...], Callable[[_Results], tuple[bool, str]]], ...] = (
    ("PGD to AutoAttack", ("pgd20", "aa"), _gap),
    ("AutoAttack's own warnings", ("aa",), _warnings),
    ("black box against white box", ("square", "pgd100"), _black_box),
    ("one step against many", ("fgsm", "pgd20"), _single_step),
    ("more steps", ("pgd20", "pgd100"), _more("pgd100", "PGD-100")),
    ("more starts", ("pgd20", "pgd20x5"), _more("pgd20x5", "the worst of five starts")),
    ("larger radii", (), _falls),  # needs the whole sweep
    ("zero gradients", ("gradients",), _zero_gradients),
    ("weighted radii against uniform", ("pgd20", "weighted"), _weighted),
    ("finite numbers", ("natural",), _free_of(NOT_FINITE, "all logits and gradients are finite")),
    ("each image by itself", ("natural",), _free_of(UNSTEADY, "logits depend on no other image, nor on chance")),
)


def _measures(results: _Results) -> dict[str, Any]:
    radius, zero = results.values("weighted", "radius"), results.values("gradients", "zero_share")
    return {
        "radius": {"min": min(radius), "mean": math.fsum(radius) / len(radius), "max": max(radius)},
        "images_without_gradient": 100 * sum(share == 1 for share in zero) / len(zero),
        "zero_gradient_share": 100 * math.fsum(zero) / len(zero),
    }


def _read_control(control: Path, which: str, evaluation: EvaluationConfig) -> dict[str, Any]:
    """The accuracies of another run's trust report, or of its evaluation: the first that fits, and that is of the
    checkpoint that the run has now."""
    paths = [Path(f"{result_path(control, which, kind)}.json") for kind in ("trust", "evaluation")]
    if not any(path.exists() for path in paths):
        raise ConfigError(f"{control}: neither {paths[0].name} nor {paths[1].name} is there; evaluate it first")
    weights, _ = read_weights(control, which)
    digest, problems = hashlib.sha256(weights.read_bytes()).hexdigest(), []
    for path in filter(Path.exists, paths):
        try:
            return _fitting(path, digest, weights.name, evaluation)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError("; ".join(problems))


def _fitting(path: Path, digest: str, checkpoint: str, evaluation: EvaluationConfig) -> dict[str, Any]:
    """What a control's result shows. Raises ConfigError where it is not of that checkpoint, radius and step."""
    try:
        found = json.loads(path.read_bytes())
        own = {name: Fraction(found[name]) for name in ("eps", "step_size")}
        attacks = {name: {k: a[k] for k in ("accuracy", "interval")} for name, a in found["attacks"].items()}
        shown = {"path": str(path), "recipe": found.get("recipe"), "n": found["n"], "attacks": attacks}
        shown["split_sha256"] = found.get("split_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is not the result of an evaluation") from error
    if found.get("sha256") != digest:
        raise ConfigError(f"{path}: is not of {checkpoint} as it is now; evaluate the control again")
    for name, value in own.items():
        if value != getattr(evaluation, name):
            raise ConfigError(f"{path}: was made with {name} {value}, not {getattr(evaluation, name)}")
    return shown
