"""The card beside an exported model: what it is and takes, how well it does, and whether that can be believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mwpb_fast.config import axis_name, to_dict
from mwpb_fast.config.changes import changed
from mwpb_fast.evaluation.checkpoint import result_path
from mwpb_fast.evaluation.trust_report import in_255
from mwpb_fast.export import MARK
from mwpb_fast.export.source import Source
from mwpb_fast.system import text_tables


def card(source: Source, file: str, loading: str, repository: str = "") -> str:
    """Markdown. file: of the exported model. loading: Python that loads it. repository: of the hub, ORG/NAME."""
    config, (height, width) = source.config, source.size
    eps = in_255(str(config.evaluation.eps))
    changes = changed(to_dict(config))
    departs = "; ".join(changes or ["nothing"]) if changes is not None else "not known: there is no such recipe"
    rows = [
        ["recipe", config.recipe],
        ["changed from it", departs],
        ["model", f"{config.model.name}, {len(source.classes)} classes"],
        ["trained on", config.data.name],
        ["budget", _axis("budgets", config.budget)],
        ["attack", _axis("attacks", config.attack)],
        ["objective", _axis("objectives", config.objective)],
        ["weight perturbation", _axis("perturbations", config.perturbation)],
        ["radius of its evaluation", f"linf {eps}, images in [0, 1]"],
        [
            "weights",
            f"epoch {source.epoch}{', averaged over the steps' if source.averaged else ''}",
        ],
        ["checkpoint", f"{source.path.name}, SHA-256 {source.sha256}"],
    ]
    lines = [
        "---",
        "library_name: mwpb-fast",
        "pipeline_tag: image-classification",
        "tags: [adversarial-robustness, adversarial-training]",
        "---",
        "",
        f"# {config.recipe}{', changed' if changes else ''}",
        "",
        f"An image classifier trained against adversarial examples; {MARK}.",
        "",
        *text_tables.markdown(["", ""], [[_cell(text) for text in row] for row in rows]),
        "",
        "## Input and output",
        "",
        f"Images (N, {source.channels}, {height}, {width}), float32 in [0, 1]; logits (N, {len(source.classes)}).",
        _normalisation(source),
        f"Classes, in this order: {', '.join(source.classes)}.",
        "",
        *([f"`hf download {repository} --local-dir .` brings the file; then:", ""] if repository else []),
        "```python",
        loading.format(file=file),
        "```",
        "",
        *_accuracy(source),
        *_trust(source),
        "## Licence",
        "",
        "mwpb-fast, which trained it, is under the MIT licence. That of the weights is for whoever publishes them",
        "to state here, as the terms of the training images allow.",
    ]
    return "\n".join(lines) + "\n"


def _axis(kind: str, config: Any) -> str:
    values = ", ".join(f"{name} {value}" for name, value in vars(config).items())
    return f"{axis_name(kind, config)}{f' ({values})' if values else ''}"


def _normalisation(source: Source) -> str:
    if source.normalize is None:
        return "They are not normalised."
    mean, std = ("[" + ", ".join(f"{value:.6g}" for value in values) + "]" for values in source.normalize)
    return f"The model itself normalises them: mean {mean}, deviation {std}, which are in the file."


def _accuracy(source: Source) -> list[str]:
    found = [result for result in _results(source, "evaluation") if result["attacks"]]
    lines = ["## Accuracy", ""]
    for result in found:
        rows = [
            [name, f"{entry['accuracy']:.2f} %", "{:.2f} to {:.2f}".format(*entry["interval"]), _ball(entry)]
            for name, entry in result["attacks"].items()
        ]
        lines += [f"{result['n']} test images{', a preview: not the whole set' if result['preview'] else ''}.", ""]
        lines += [*text_tables.markdown(["attack", "accuracy", "95 % interval", "ball"], rows), ""]
        lines += [f"Warning ({kind}): {w['message']}\n" for kind, w in result.get("warnings", {}).items()]
    return lines if found else [*lines, "This checkpoint was not evaluated.", ""]


def _ball(entry: dict[str, Any]) -> str:
    return f"{entry['norm']} {entry['eps']}" if "eps" in entry else ""


def _trust(source: Source) -> list[str]:
    lines = ["## Can it be believed?", ""]
    reports = _results(source, "trust")
    for report in reports:
        lines += [f"By `mwpb-fast trust`, on {report['n']} test images:", ""]
        lines += [*(f"- {v['verdict']}: {v['check']}: {v['text']}" for v in report["verdicts"]), ""]
    return lines if reports else [*lines, "Nobody has looked: there is no report of `mwpb-fast trust`.", ""]


def _results(source: Source, kind: str) -> list[dict[str, Any]]:
    """Those of exactly this checkpoint; the result of an earlier one says nothing of it."""
    stem, found = result_path(source.target, source.which, kind), []
    for path in (Path(f"{stem}.json"), Path(f"{stem}-preview.json")):
        try:
            result = json.loads(path.read_bytes())
            if result["sha256"] == source.sha256:
                found.append(result)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
