"""From a flag for each image to the numbers of a result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mwpb_fast.attacks.autoattack import square_warning
from mwpb_fast.log import table

if TYPE_CHECKING:
    from mwpb_fast.attacks.sharded import ShardedAttack

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


def summary(attack: ShardedAttack) -> dict[str, Any]:
    """The numbers of a finished attack. For a composed one also the accuracy after each component, how it
    departs from the standard, and its warnings: kind -> message and the shards that gave it."""
    records = [attack.records[number] for number in range(len(attack.shards))]
    result = score("".join(record["flags"] for record in records))
    result["seconds"] = round(sum(record["seconds"] for record in records), 3)
    stages = list(records[0]["after"])
    if not stages:
        return result
    after = {s: score("".join(record["after"][s] for record in records))["accuracy"] for s in stages}
    warnings: dict[str, dict[str, Any]] = {}
    for record in records:
        for kind, message in record["warnings"].items():
            warnings.setdefault(kind, {"message": message, "shards": []})["shards"].append(record["shard"])
    late = square_warning({stage: accuracy / 100 for stage, accuracy in after.items()})
    warnings |= {kind: {"message": message, "shards": []} for kind, message in late.items()}
    deviations = sorted({text for record in records for text in record["deviations"]})
    return result | {"after": after, "warnings": warnings, "deviations": deviations}


def format_table(result: dict[str, Any]) -> str:
    """The result as text for a terminal: attack, accuracy, interval; then what to know about them."""
    rows = [
        [name, f"{attack['accuracy']:.2f} %", "{:.2f} to {:.2f}".format(*attack["interval"])]
        for name, attack in [*result["attacks"].items(), ("worst of these", result["worst"])]
    ]
    lines = list(table(["attack", "accuracy", "95 % interval"], rows))
    what = f"{result['n']} images, {result['norm']} eps {result['eps']}, step {result['step_size']}"
    lines.append(what + (", a preview: not the whole test set" if result["preview"] else ""))
    for name, attack in result["attacks"].items():
        if attack.get("after"):
            steps = ", ".join(f"{stage} {accuracy:.2f}" for stage, accuracy in attack["after"].items())
            lines.append(f"{name}, accuracy after each part: {steps}")
        lines += [f"{name} departs from the standard: {text}" for text in attack.get("deviations", [])]
    lines += [f"warning ({kind}): {warning['message']}" for kind, warning in result["warnings"].items()]
    return "\n".join(lines)
