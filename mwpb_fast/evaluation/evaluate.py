"""Attacks over a test set: sharded, resumable, in float32, and with all that a result depends on on record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mwpb_fast.config import EvaluationConfig, PrecisionConfig
from mwpb_fast.engine.precision import Precision, make_precision
from mwpb_fast.evaluation.adversaries import write as write_images
from mwpb_fast.evaluation.model_checks import Model
from mwpb_fast.evaluation.per_class import by_class, confusion
from mwpb_fast.evaluation.score import not_finite, summary, worst
from mwpb_fast.evaluation.session import Session, TestSet
from mwpb_fast.evaluation.sharded import Report, ShardedAttack
from mwpb_fast.runs.log import progress
from mwpb_fast.system.files import to_json, write_atomically
from mwpb_fast.system.processes import Helpers

FORMAT = 2
SURE = 0.05  # of an attack must be done before its time left is told: the first images say little of it
StartHelpers = Callable[[int], AbstractContextManager[Helpers]]


def evaluate(
    model: Model,
    images: TestSet,
    config: EvaluationConfig,
    precision: Precision | None = None,
    *,
    folder: Path | None = None,
    seed: int = 0,
    show: bool = True,
    save_images: bool = False,
) -> dict[str, Any]:
    """Attack `model` on a test set by the attacks of `config` and return what came out, in plain types:

        evaluate(model.eval(), (x, y), EvaluationConfig(attacks=("natural", "pgd20")))

    model: a module in eval mode, float32 weights, on the precision's device, which is left as it was; or any
    function from images to logits. images: a data set's Images; (x, y) with x (N, C, H, W) float in [0, 1] or
    uint8 and y (N,) integers; or a loader of such batches, read once. precision: float32, on the device of the
    model's weights, or of x where it has none, if None. folder: keeps finished shards, so that the same call goes
    on after a kill; the result goes to the same path with .json, see `write_result`; or None. seed: of what is
    random in the attacks. show: a bar of progress for each attack. save_images: keep the adversarial images in
    the folder, a file for each attack, see `adversaries`. For a run's folder or a file there is
    `checkpoint.evaluate_run`; for more than is asked for here, a `Session` and `attack_all`.

    The result holds for each attack the accuracy in percent, its 95 % Wilson interval, a flag 0 or 1 for each
    image, the ball that it kept to, the accuracy of each class and the confusion table, see `per_class`; under
    "worst" the point-wise worst case, see score.worst; under "warnings" what makes it doubtful. Raises
    EvaluationError and ConfigError, in one line.
    """
    if precision is None:
        precision = make_precision(PrecisionConfig(device=str(_device(model, images)), dtype="fp32"))
    with torch.inference_mode(False):
        session = Session(model, images, config, precision, folder, seed, save_images=save_images)
        result = attack_all(session, show=show)
    if folder is not None:
        write_result(folder, result)
    return result


def attack_all(
    session: Session,
    *,
    show: bool = True,
    tick: Callable[[], None] = lambda: None,
    start_helpers: StartHelpers = lambda unfinished: nullcontext(Helpers()),
) -> dict[str, Any]:
    """All the session's attacks, and their result as `evaluate` describes it.

    tick: called before every forward pass, may raise to stop. start_helpers: given the number of unfinished
    shards of the long attacks, the processes that do their part of them by `attack_share`.
    """
    with session.ready(tick):
        attacks = {name: session.attack(name) for name in session.attacks}
        long = [attack for attack in attacks.values() if attack.attack.long]
        with start_helpers(sum(len(attack.unfinished) for attack in long)) as helpers:
            for name, attack in attacks.items():
                share = 1 + helpers.count if attack in long else 1
                mine = [number for number in attack.unfinished if number % share == 0]
                with _shown(name, attack, mine, show) as report:
                    attack.run(session.model, mine, report)
                    if share > 1:
                        helpers.wait(tick)
                if rest := attack.unfinished:  # what a helper that died has left
                    with _shown(name, attack, rest, show) as report:
                        attack.run(session.model, rest, report)
    results = {name: summary(attack, len(session.index)) for name, attack in attacks.items()}
    for name, attack in attacks.items():
        _add_classes(session, results[name], attack.index, [attack.records[n] for n in range(len(attack.shards))])
        if name in session.named:  # null: of shards that kept no predictions, whose flags are as good as ever
            results[name].setdefault("confusion", None)
        if attack.images:
            write_images(
                attack.images, attack, {"model_sha256": session.model_hash, "seed": str(session.setting.seed)}
            )
            results[name]["saved"] = attack.images.name
    together = worst({name: results[name] for name in session.named}, session.index.tolist(), session.setting)
    if "worst" in together:
        _add_classes(session, together["worst"], session.index)
    doubts: dict[str, Any] = {
        kind: {"message": message, "shards": []}
        for kind, message in (session.doubts | not_finite(results)).items()
    }
    return {
        "format": FORMAT,
        **session.describe(),
        "preview": session.preview,
        "attacks": results,
        **together,
        "warnings": doubts | {k: v for r in results.values() for k, v in r.get("warnings", {}).items()},
    }


def attack_share(session: Session, part: int, parts: int, tick: Callable[[], None]) -> None:
    """What a helper of `attack_all` does: its part, from 1 to parts - 1, of the shards of the long attacks."""
    with session.ready(tick):
        for name in session.named:
            if session.attacks[name].long:
                attack = session.attack(name)
                attack.run(session.model, range(part, len(attack.shards), parts))


@contextmanager
def _shown(name: str, attack: ShardedAttack, shards: Sequence[int], show: bool) -> Iterator[Report]:
    """Shows how far an attack is from the reports of `shards`, which this process has; those that helpers have are
    taken to be as far."""
    images = [len(attack.shards[number]) for number in attack.unfinished]
    left, own, told = sum(images), sum(len(attack.shards[number]) for number in shards), 0
    before = len(attack.index) - left
    with progress(len(attack.index), name, done=before, sure=SURE, form="lines" if show else "quiet") as bar:

        def report(images: int, part: str) -> None:
            nonlocal told
            told += images
            bar.advance(before + left * told // own - bar.done, f"({part})" if part else "")

        yield report


def write_result(path: Path, result: dict[str, Any]) -> Path:
    """Keep a result as `path` with .json after its name; a preview beside a result on the whole set, with
    -preview.json. Returns the path without .json."""
    path = place(path, result)
    write_atomically(Path(f"{path}.json"), (to_json(result, indent=1) + "\n").encode())
    return path


def place(path: Path, result: dict[str, Any]) -> Path:
    """Where `write_result` keeps it, without .json."""
    aside = result["preview"] and _is_whole(Path(f"{path}.json"))
    return path.with_name(f"{path.name}-preview") if aside else path


def _add_classes(
    session: Session, entry: dict[str, Any], index: torch.Tensor, records: Sequence[dict[str, Any]] = ()
) -> None:
    labels, classes = session.labels[index], len(session.classes)
    entry["per_class"] = by_class(entry["flags"], labels, classes)
    predicted = [record["predicted"] for record in records]
    if predicted and None not in predicted:
        entry["confusion"] = confusion([one for part in predicted for one in part], labels, classes)


def _device(model: Model, images: TestSet) -> torch.device:
    weights = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    first = weights if weights is not None or not isinstance(images, (tuple, list)) else next(iter(images), None)
    return first.device if isinstance(first, torch.Tensor) else torch.device("cpu")


def _is_whole(path: Path) -> bool:
    try:
        return json.loads(path.read_bytes())["preview"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False
