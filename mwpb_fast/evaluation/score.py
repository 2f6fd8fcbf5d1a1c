"""From a flag for each image to the numbers of a result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mwpb_fast.evaluation.autoattack import square_warning
from mwpb_fast.evaluation.randomised import RIGHT_SHARE
from mwpb_fast.system import text_tables

if TYPE_CHECKING:
    from mwpb_fast.evaluation.contract import AttackSetting
    from mwpb_fast.evaluation.sharded import ShardedAttack

NORMAL_QUANTILE = 1.959963984540054  # 97.5 %


def score(flags: str) -> dict[str, Any]:
    """Accuracy in percent, its 95 % interval, the count of right images, and the flags themselves."""
    correct = flags.count("1")
    low, high = wilson(correct, len(flags))
    accuracy = 100 * correct / len(flags)
    return {"accuracy": accuracy, "interval": [100 * low, 100 * high], "correct": correct, "flags": flags}


def wilson(successes: int, n: int, z: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), within [0, 1]."""
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # the ends are exact; rounding is not
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def statistics(values: Sequence[float]) -> dict[str, Any]:
    """Number, mean and sample standard deviation (n - 1); None where there are too few values for it."""
    n = len(values)
    mean = math.fsum(values) / n if n else None
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if mean is not None and n > 1 else None
    return {"n": n, "mean": mean, "std": std}


def interval(found: dict[str, Any]) -> list[float] | None:
    """Student's 95 % interval of the mean of `statistics`; None where there are too few values for it."""
    if found["std"] is None:
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(found["n"] - 1, 0.975)) * found["std"] / math.sqrt(found["n"])
    return [found["mean"] - half, found["mean"] + half]


def summary(attack: ShardedAttack, whole: int) -> dict[str, Any]:
    """The numbers of a finished attack: score, ball, parameters, seconds for which anybody was at it, images sent
    through the model; which images where they are not the whole evaluation's. For AutoAttack also the accuracy
    after each component, how it departs from the standard, and its warnings: kind -> message and the shards that
    gave it."""
    records = [attack.records[number] for number in range(len(attack.shards))]
    flags = "".join(record["flags"] for record in records)
    result = score(flags) | _ball(attack) | {"n": len(flags)}
    if len(flags) < whole:
        result["images"] = attack.index.tolist()
    result["seconds"] = time_taken((record.get("began"), record["seconds"]) for record in records)
    result["forwards"] = sum(record["forwards"] for record in records)
    if attack.engine:
        result["engine"] = attack.engine
        result["refuted"] = sum(record.get("refuted", 0) for record in records)
    bad = {kind: sum(record["not_finite"][kind] for record in records) for kind in ("logits", "gradients")}
    if any(bad.values()):
        result["not_finite"] = bad
    if attack.attack.parameters:
        result["parameters"] = attack.attack.parameters
    if records[0]["values"]:
        measured = list(records[0]["values"])
        result["values"] = {name: [v for record in records for v in record["values"][name]] for name in measured}
    stages = list(records[0]["after"])
    if not stages:
        return result
    after = {s: score("".join(record["after"][s] for record in records))["accuracy"] for s in stages}
    warnings: dict[str, dict[str, Any]] = {}
    for record in records:
        for kind, message in record["warnings"].items():
            warnings.setdefault(kind, {"message": message, "shards": []})["shards"].append(record["shard"])
    if attack.attack.preview:
        result |= {"preview": True, "stages": _stages(records)}
    late = square_warning({stage: accuracy / 100 for stage, accuracy in after.items()})
    warnings |= {kind: {"message": message, "shards": []} for kind, message in late.items()}
    deviations = sorted({text for record in records for text in record["deviations"]})
    return result | {"after": after, "warnings": warnings, "deviations": deviations}


def time_taken(spans: Iterable[tuple[float | None, float]]) -> float:
    """For how many seconds at least one of (its beginning, its seconds) went on: what several processes do at once
    counts once, and a break between two of them does not. One whose beginning is not known counts in full."""
    total, end = 0.0, -math.inf
    for began, seconds in sorted(spans, key=lambda span: -math.inf if span[0] is None else span[0]):
        if began is None:
            total += seconds
        else:
            total += max(began + seconds - max(began, end), 0.0)
            end = max(began + seconds, end)
    return round(total, 3)


def _stages(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`time_taken` by each stage; a shard's stages come one after the other."""
    spans: dict[str, list[tuple[float | None, float]]] = {}
    for record in records:
        began = record.get("began")
        for name, seconds in record.get("stages", {}).items():
            spans.setdefault(name, []).append((began, seconds))
            began = None if began is None else began + seconds
    return {name: time_taken(spans[name]) for name in sorted(spans)}


def not_finite(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What to say of the logits and gradients of these attacks that were not finite, by kind of warning."""
    told = {"logits": "which counts as wrong", "gradients": "which leads an attack nowhere"}
    found = {}
    for kind, what in told.items():
        counts = {name: r["not_finite"][kind] for name, r in results.items() if r.get("not_finite", {}).get(kind)}
        if counts:
            where = ", ".join(f"{count} times in {name}" for name, count in counts.items())
            found[f"not_finite_{kind}"] = f"the model's {kind} are not finite, {what}: {where}"
    return found


def _ball(attack: ShardedAttack) -> dict[str, Any]:
    setting = attack.setting
    own = attack.attack.per_image.format(eps=setting.eps)
    ball: dict[str, Any] = {}
    if attack.attack.ball:
        ball |= {"norm": setting.norm, "eps": own or str(setting.eps)}
        ball |= {} if own else {"eps_float": float(setting.eps)}
    if attack.attack.stepped:
        ball |= {"step_size": str(setting.step_size), "step_size_float": float(setting.step_size)}
    return ball


def worst(results: dict[str, dict[str, Any]], images: list[int], setting: AttackSetting) -> dict[str, Any]:
    """Point-wise worst case over what is comparable: the attacks in the evaluation's own norm and radius that are
    no previews, and no attack at all.

    "worst" is over those that saw every image, and says which in "of". Where some saw fewer, "worst_common" is
    over all of them on the images that all of them saw. Neither is there where there is nothing to compare.
    """
    own = {"norm": setting.norm, "eps": str(setting.eps)}
    comparable = {
        name: r
        for name, r in results.items()
        if ("eps" not in r or own.items() <= r.items()) and not r.get("preview")
    }
    full = {name: r for name, r in comparable.items() if "images" not in r}
    found: dict[str, Any] = {}
    if full:
        found["worst"] = pointwise([r["flags"] for r in full.values()]) | {"of": list(full)}
    if full.keys() < comparable.keys():
        by_image = [dict(zip(r.get("images", images), r["flags"], strict=True)) for r in comparable.values()]
        common = [image for image in images if all(image in flags for flags in by_image)]
        flags = ["".join(one[image] for image in common) for one in by_image]
        found["worst_common"] = pointwise(flags) | {"of": list(comparable), "n": len(common), "images": common}
    return found


def pointwise(flags: Sequence[str]) -> dict[str, Any]:
    """The score where an image is right under every attack. flags: of each attack, on the same images."""
    return score("".join(map(min, zip(*flags, strict=True))))


def format_table(result: dict[str, Any]) -> str:
    """The result as text for a terminal: attack, ball, accuracy, interval; then what to know about them."""
    rows = [
        [*_row(name + " (a preview)" * ("preview" in attack), attack), _ball_text(attack)]
        for name, attack in result["attacks"].items()
    ]
    for title, key in (("worst of {}", "worst"), ("worst of {}, on {n} images", "worst_common")):
        if key in result:
            entry = result[key]
            which = "these" if len(entry["of"]) == len(result["attacks"]) else ", ".join(entry["of"])
            rows.append([*_row(title.format(which, n=entry.get("n")), entry), ""])
    lines = list(text_tables.plain(["attack", "accuracy", "95 % interval", "ball"], rows))
    what = f"{result['n']} images, {result['norm']} eps {result['eps']}, step {result['step_size']}"
    lines.append(what + (", a preview: not the whole test set" if result["preview"] else ""))
    lines += [result["weights"]] if "weights" in result else []
    lines += result["notes"]
    for name, attack in result["attacks"].items():
        if len(attack.get("after", ())) > 2:
            steps = ", ".join(f"{stage} {accuracy:.2f}" for stage, accuracy in attack["after"].items())
            lines.append(f"{name}, accuracy after each part: {steps}")
        if "engine" in attack:
            lines.append(f"{name} searched on {attack['engine']}; the model itself judged, in full float32")
        if "preview" in attack:
            lines.append(_preview_text(name, attack, result["attacks"].get("aa", {})))
        if RIGHT_SHARE in attack.get("values", ()):
            shares = attack["values"][RIGHT_SHARE]
            share = 100 * math.fsum(shares) / len(shares)
            lines.append(f"{name}, predictions drawn again at the images that it ends at: {share:.2f} % right")
        if "saved" in attack:
            lines.append(f"{name}, adversarial images: {attack['saved']}")
        if "images" in attack:
            lines.append(f"{name}: a fixed part of the images, {attack['n']} of them, stratified by class")
        lines += [f"{name} departs from the standard: {text}" for text in attack.get("deviations", [])]
    lines += [f"warning ({kind}): {warning['message']}" for kind, warning in result["warnings"].items()]
    return "\n".join(lines)


def _preview_text(name: str, attack: dict[str, Any], standard: dict[str, Any]) -> str:
    """How much sooner a preview has its verdict. standard: the attack that it looks ahead to, if that was run."""
    counts = [round(attack["after"][stage] * attack["n"] / 100) for stage in ("clean", "prefilter")]
    spent = attack["stages"]
    text = (
        f"{name} is a preview, not AutoAttack's verdict: the prefilter settled {counts[0] - counts[1]} of "
        f"{counts[0]} images in {spent['prefilter']:.1f} s, AutoAttack had {counts[1]} for "
        f"{spent.get('standard', 0.0):.1f} s"
    )
    same = standard.get("eps") == attack["eps"] and standard.get("n") == attack["n"]
    return text + (f"; aa took {standard['seconds']:.1f} s" if same else "")


def _row(name: str, entry: dict[str, Any]) -> list[str]:
    return [name, f"{entry['accuracy']:.2f} %", "{:.2f} to {:.2f}".format(*entry["interval"])]


def _ball_text(attack: dict[str, Any]) -> str:
    return f"{attack['norm']} {attack['eps']}" if "eps" in attack else ""
