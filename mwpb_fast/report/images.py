"""A few test images as an attack sees them, and the margins of more, from the checkpoint and the data.

This alone of a report needs torch.
"""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mwpb_fast.config import ConfigError
from mwpb_fast.report.read import Result

if TYPE_CHECKING:
    import torch

    from mwpb_fast.engine.net import EagerNet
    from mwpb_fast.evaluation.checkpoint import Subject

STEPS = 10
MOST = 500  # images whose margins are taken,
SECONDS = 3.0  # as far as they are to be had in that time; but those of a first batch always
BATCH = 50
LARGEST = 64  # pixels of a picture's longer side


@dataclass(frozen=True)
class Shown:
    """One image of the grid. pictures: natural, adversarial, difference, as data: addresses of PNGs. margins,
    predicted: of the first two."""

    index: int
    label: str
    pictures: tuple[str, str, str]
    margins: tuple[float, float]
    predicted: tuple[str, str]


@dataclass(frozen=True)
class Looked:
    """points: (margin, radius in 1/255, what becomes of it) of test images; empty where the radii are not the
    budget's. eps, step_size: of the attack on those that are shown."""

    points: list[tuple[float, float, str]]
    shown: list[Shown]
    eps: str
    step_size: str


def look(folder: Path, result: Result | None, count: int) -> Looked:
    """Margins of test images, and `count` of them between the smallest margin and the largest, attacked by PGD-10
    at the evaluation's radius. Raises ConfigError, a line, for whatever stands against it."""
    try:
        return _look(folder, result, count)
    except MemoryError:
        raise
    except Exception as error:  # the checkpoint's, the data's, the user's own modules', the device's
        raise ConfigError(" ".join(str(error).split()) or type(error).__name__) from error


def _look(folder: Path, result: Result | None, count: int) -> Looked:
    import mwpb_kernels as ops
    import torch

    from mwpb_fast import data
    from mwpb_fast.engine.net import EagerNet
    from mwpb_fast.evaluation.checkpoint import Subject
    from mwpb_fast.evaluation.request import Request
    from mwpb_fast.evaluation.session import choose

    subject = Subject(Request(folder, which=result.which if result else "best", device="auto", show=False))
    images, precision, config = subject.images, subject.precision, subject.config
    assert isinstance(images, data.Images)  # a run's; a model in code has none
    assert isinstance(subject.model, torch.nn.Module)
    net, budget, started = EagerNet(subject.model, precision), config.budget.build(), time.monotonic()
    rows: list[tuple[int, float, float]] = []
    with precision.mode(), torch.random.fork_rng([]):
        chosen, _ = choose(images.labels, min(MOST, len(images)))
        for x, y, index in data.eval_batches(images, precision.device, BATCH, chosen, precision.memory_format):
            logits = net.logits(x)
            radius = 255 * budget(logits, y)
            rows += zip(index.tolist(), ops.margin(logits, y).tolist(), radius.tolist(), strict=True)
            if time.monotonic() - started > SECONDS:
                break
        shown = _attacked(subject, net, _spread([(margin, i) for i, margin, _ in rows], count))
    fates = _fates(result, images.labels)
    points = [(m, r, "wrong" if m < 0 else fates.get(i, "right")) for i, m, r in rows]
    evaluation = subject.evaluation
    points = [] if config.attack.own_radius else points
    return Looked(points, shown, str(evaluation.eps), str(evaluation.step_size))


def _spread(margins: list[tuple[float, int]], count: int) -> list[int]:
    """The images whose margins are nearest to `count` even steps from the smallest to the largest, each once."""
    left, chosen = sorted(margins), []
    low, high = left[0][0], left[-1][0]
    for step in range(min(count, len(left))):
        aim = low + (high - low) * step / max(count - 1, 1)
        nearest = min(left, key=lambda pair: abs(pair[0] - aim))
        left.remove(nearest)
        chosen.append(nearest)
    return [index for _, index in sorted(chosen)]


def _fates(result: Result | None, labels: torch.Tensor) -> dict[int, str]:
    """What became of each test image in the worst case of a result of this checkpoint."""
    from mwpb_fast.evaluation.session import choose

    worst = result.worst if result and not result.stale else None
    if result is None or worst is None:
        return {}
    index = choose(labels, result.n)[0].tolist()
    if len(index) != worst.n:
        return {}
    return {i: "holds" if flag == "1" else "falls" for i, flag in zip(index, worst.flags, strict=True)}


def _attacked(subject: Subject, net: EagerNet, chosen: list[int]) -> list[Shown]:
    import mwpb_kernels as ops
    import torch

    from mwpb_fast import data
    from mwpb_fast.attacks import pgd
    from mwpb_fast.evaluation.accuracy import predicted
    from mwpb_fast.inner_losses import cross_entropy

    images, precision, evaluation = subject.images, subject.precision, subject.evaluation
    assert isinstance(images, data.Images)
    batches = data.eval_batches(
        images, precision.device, len(chosen), torch.tensor(chosen), precision.memory_format
    )
    batch = next(iter(batches))
    eps = float(evaluation.eps)
    attack = pgd.Config(steps=STEPS, start="uniform", step_size=evaluation.step_size).build()
    key = torch.tensor([ops.derive_seed(0)], device=precision.device)
    radius = torch.full(batch.y.shape, eps, device=precision.device)
    x_adv = attack(net, batch, None, radius, cross_entropy, key)
    difference = (0.5 + (x_adv - batch.x) / (2 * eps)).clamp(0, 1) if eps else torch.full_like(batch.x, 0.5)
    logits = [net.logits(x) for x in (batch.x, x_adv)]
    margins = [ops.margin(one, batch.y).tolist() for one in logits]
    taken_for = [[_name(images.classes, i) for i in predicted(one).tolist()] for one in logits]
    return [
        Shown(
            index=index,
            label=_name(images.classes, int(images.labels[index])),
            pictures=(_png(batch.x[i]), _png(x_adv[i]), _png(difference[i])),
            margins=(margins[0][i], margins[1][i]),
            predicted=(taken_for[0][i], taken_for[1][i]),
        )
        for i, index in enumerate(chosen)
    ]


def _name(classes: tuple[str, ...], index: int) -> str:
    return classes[index] if 0 <= index < len(classes) else f"class {index}" if index >= 0 else "nothing"


def _png(x: torch.Tensor) -> str:
    """An image (C, H, W) in [0, 1] as a data: address; a large one is made smaller."""
    from PIL import Image

    pixels = (255 * x).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
