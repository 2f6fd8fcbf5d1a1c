"""A checkpoint's trust report: whether its robust accuracy can be believed, in numbers and in plain verdicts.

Beside the result at the run's own, margin-weighted radii stand AutoAttack at one uniform radius, and what gives
away masked gradients (Athalye, Carlini and Wagner, ICML 2018; Carlini et al., 2019): single steps or black boxes
that beat PGD, steps or starts that keep helping, accuracy that outlives any radius, gradients that are zero.
The evaluation itself is tested by planted examples (`planted`), and its attack by how it fails (`indicators`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from mwpb_fast.config import ConfigError, EvaluationConfig
from mwpb_fast.data import Images
from mwpb_fast.evaluation.checkpoint import Subject, read_weights, result_path
from mwpb_fast.evaluation.contract import EvaluationAttack
from mwpb_fast.evaluation.indicators import slopes, trace
from mwpb_fast.evaluation.planted import planted
from mwpb_fast.evaluation.probes import gradients, weighted
from mwpb_fast.evaluation.request import Request
from mwpb_fast.evaluation.session import TestSet, choose
from mwpb_fast.evaluation.trust_checks import CHECKS, RESTARTS, STEPS, Results, measures
from mwpb_fast.evaluation.trust_report import markdown
from mwpb_fast.meant import meant
from mwpb_fast.system.files import write_atomically

UNEQUAL = ("pgd20-weighted", "pgd20-reversed")
FACTORS = (Fraction(3, 4), Fraction(1), Fraction(5, 4), Fraction(3, 2), *(Fraction(2**k) for k in range(1, 5)))


def trust_run(
    request: Request,
    *,
    without: Sequence[str] = (),
    control: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The trust report of what a request asks for; the attacks of its evaluation are not looked at.

    without: attacks to leave out, whose checks are then said not to be run. control: another run to stand beside
    it, its checkpoint evaluated before at the same radius and step. tell: as `evaluate_run` has it, whose finished
    shards are taken. The same call goes on after a kill. The report goes to trust-<which>.json and .md in the run
    folder, beside the file for a file. Raises what `evaluate_run` raises.
    """
    evaluation = request.evaluation or Subject(request).evaluation
    names = plan(evaluation)
    if unknown := sorted(set(without) - set(names)):
        raise ConfigError(f"no attack {unknown[0]!r} in the trust report{meant(unknown[0], names)}")
    beside = None if control is None else _read_control(control, request.which, evaluation)
    named = dataclasses.replace(evaluation, attacks=tuple(name for name in names if name not in without))
    subject = Subject(dataclasses.replace(request, evaluation=named))
    result = subject.attack(probes(subject.config.budget))
    report = judge(result, evaluation, _autoattack(request, result, subject.images))
    if beside is not None:
        split = beside["split_sha256"]
        if split not in (None, result["split_sha256"]):  # None: made by a version that did not write it
            raise ConfigError(f"{beside['path']}: was made on other test images; evaluate the control again")
        report["control"] = beside
    path = result_path(request.target, request.which, "trust", request.weights)
    stem = subject.write(path, report, tell)
    write_atomically(Path(f"{stem}.md"), (markdown(report) + "\n").encode("utf-8", "backslashreplace"))
    return report


def _autoattack(request: Request, result: dict[str, Any], images: TestSet) -> str:
    """AutoAttack's flags on the result's images, from the evaluation of the same weights at the same radius; ""
    where there is none that saw all of them."""
    try:
        path = Path(f"{result_path(request.target, request.which)}.json")
        found = json.loads(path.read_bytes())
        entry = found["attacks"]["aa"]
        same = all(found[k] == result[k] for k in ("sha256", "split_sha256", "norm", "eps"))
        if not same or entry["eps"] != result["eps"] or not isinstance(images, Images):
            return ""
        seen, own = (
            choose(images.labels, one["n"] if one["preview"] else 0)[0].tolist() for one in (found, result)
        )
        flags = dict(zip(seen, entry["flags"], strict=True))
        return "".join(flags[image] for image in own)
    except (OSError, ValueError, KeyError, TypeError):  # none, of a model in code, or not what is written there
        return ""


def probes(budget_config: Any) -> dict[str, EvaluationAttack]:
    """What a report measures besides the attacks of `plan`. budget_config: the run's own, see `weighted`."""
    measured = {"weighted": weighted(budget_config), "gradients": gradients()}
    return measured | {"slopes": slopes(), "trace": trace(), "planted": planted()}


def plan(evaluation: EvaluationConfig) -> list[str]:
    """The attacks of a report, each once; the longest last."""
    names = ["natural", "fgsm", *STEPS, "cw20", *RESTARTS, *UNEQUAL, *sweep(evaluation), "square", "aa"]
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


def judge(result: dict[str, Any], evaluation: EvaluationConfig, autoattack: str = "") -> dict[str, Any]:
    """The result of an evaluation by `plan` and the probes, with "sweep", "measures" and "verdicts" added.
    autoattack: see `Results`."""
    attacks = result["attacks"]
    named = [name for name in sweep(evaluation) if name in attacks]
    results = Results(attacks, result.get("warnings", {}), named, autoattack)
    verdicts = []
    for title, needs, check in CHECKS:
        needs = needs or tuple(sweep(evaluation))
        missing = [name for name in needs if name not in attacks]
        if missing:
            verdicts.append({"check": title, "verdict": "not run", "text": f"without {', '.join(missing)}"})
            continue
        ok, text = check(results)
        verdict = {True: "ok", False: "doubt", None: "note"}[ok]
        verdicts.append({"check": title, "verdict": verdict, "text": text})
    return {**result, "sweep": results.sweep, "measures": measures(results), "verdicts": verdicts}


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
