"""Adversarial images of a file, checked again: by the model itself, in full float32, and against their ball."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from mwpb_fast.config import EvaluationConfig, PrecisionConfig
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.evaluation import adversaries
from mwpb_fast.evaluation.accuracy import predicted
from mwpb_fast.evaluation.checkpoint import Subject
from mwpb_fast.evaluation.contract import BALL_TOLERANCE, distances
from mwpb_fast.evaluation.filled import named_model
from mwpb_fast.evaluation.named import is_name
from mwpb_fast.evaluation.request import Request
from mwpb_fast.evaluation.session import Session


def verify(file: Path, request: Request) -> list[tuple[bool | None, str]]:
    """What there is to check of the images in `file`, each with whether it holds, None for a note: that they lie
    in [0, 1] and in their balls; that the natural ones are the request's test images; that its model predicts on
    them what the file says, which is a note where predictions are random; and, as a note, what becomes of them
    when they are rounded to 8 bits. Raises what `evaluate_run` raises."""
    saved, about = adversaries.read(file)
    x_adv, x, y, n = saved["x_adv"], saved["x"], saved["y"], len(saved["y"])
    norm = about["norm"]
    inside = (distances(x_adv, x, norm) <= saved["radius"] + BALL_TOLERANCE) & (
        ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    )
    what = "the radii that it was given" if about["eps"] == "" else f"{norm} {about['eps']}"
    checks: list[tuple[bool | None, str]] = []
    checks.append((bool(inside.all()), f"{int(inside.sum())} of {n} images are in [0, 1] and within {what}"))
    natural = EvaluationConfig(attacks=("natural",), batch_size=_batch_size(request))
    if is_name(request.target) and request.config is None:
        model = named_model(str(request.target), request.weights).model
        precision = make_precision(PrecisionConfig(device=request.device or "auto", dtype="fp32"))
        if isinstance(model, torch.nn.Module):
            model.to(precision.device)
    else:
        subject = Subject(request)
        model, precision = subject.model, subject.precision
        own = Session(model, subject.images, natural, precision)
        checks.append(_of_the_test_set(own, saved))
    session = Session(model, (x, y), natural, precision)
    known = session.model_hash == about["model_sha256"]
    now = _predicted(session, x_adv)
    agree = (now == y) == (saved["predicted"] == y)
    which = "the model" if known else "another model than was attacked"
    draws = "randomized" in session.function.doubts
    which += ", whose predictions are random," * draws
    checks.append(
        (
            None if draws else bool(agree.all()),
            f"{which} gets {_share(now == y)} right, the file says {_share(saved['predicted'] == y)}",
        )
    )
    if about["uint8_exact"] != "true":
        rounded = (255 * x_adv).round() / 255
        checks.append(
            (None, f"rounded to 8 bits, the model gets {_share(_predicted(session, rounded) == y)} right")
        )
    return checks


def _batch_size(request: Request) -> int:
    return request.evaluation.batch_size if request.evaluation else EvaluationConfig().batch_size


def _of_the_test_set(session: Session, saved: dict[str, torch.Tensor]) -> tuple[bool, str]:
    index = saved["index"]
    if int(index.max()) >= len(session.labels) or saved["x"].shape[1:] != session.pixels.shape[1:]:
        return False, "the images are not of this test set"
    same = torch.zeros(len(index), dtype=torch.bool)
    for part in torch.arange(len(index)).split(1000):
        x, y = session.load(index[part])
        close = (x.cpu() - saved["x"][part]).abs().flatten(1).amax(1) <= BALL_TOLERANCE
        same[part] = close & (y.cpu() == saved["y"][part])
    return bool(same.all()), f"{int(same.sum())} of {len(same)} natural images are the test set's"


def _predicted(session: Session, x: torch.Tensor) -> torch.Tensor:
    found, device = [], session.precision.device
    with session.ready(lambda: None), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for part in x.split(session.setting.batch_size):
            logits = session.model.with_room(partial(session.model, part.to(device)))
            found.append(predicted(logits).cpu())
    return torch.cat(found)


def _share(flags: torch.Tensor) -> str:
    return f"{int(flags.sum())} of {len(flags)} ({100 * flags.double().mean().item():.2f} %)"
