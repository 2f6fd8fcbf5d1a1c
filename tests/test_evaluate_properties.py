"""Where wrong numbers could come from in silence, looked for at random: wrappers, outputs, labels."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    Wrap,
    config,
    flags_of,
    labelled,
    linear,
    one_thread,  # noqa: F401  # an autouse fixture
    run,
)
from torch import Tensor, nn

from mwpb_fast.evaluation.model_checks import EvaluationError

Change = Callable[[Tensor], Tensor]
Model = Callable[[Tensor], Any]


def random_wrapper(draw: random.Random) -> tuple[Change, Change]:
    """A change of images and one of logits, each a chain of small ones; what they are stands in closures."""

    def images() -> Change:
        a, b = draw.uniform(0.3, 1), draw.randrange(4)
        shifted: list[Change] = [
            lambda x: x * a, lambda x: 1 - x, lambda x: x.roll(b, 3), lambda x: x.flip(2),
            lambda x: x + a * x.mean(),
            lambda x: x.round(decimals=1) * a, lambda x: x * a + (x * (1 - a)).detach(), lambda x: x.clamp(max=a),
        ]  # fmt: skip
        return draw.choice(shifted)

    def logits() -> Change:
        a, b = draw.uniform(0.5, 2), draw.randrange(1, 10)
        changed: list[Change] = [
            lambda z: z * a, lambda z: z.roll(b, 1), lambda z: z + a * torch.arange(10) / 10, lambda z: -z,
            lambda z: z.tanh(), lambda z: z.log_softmax(1) * a, lambda z: z.index_fill(1, torch.tensor([b]), -a),
        ]  # fmt: skip
        return draw.choice(changed)

    before = [images() for _ in range(draw.randrange(3))]
    after = [logits() for _ in range(draw.randrange(3))]
    return chain(before), chain(after)


def chain(changes: list[Change]) -> Change:
    def all_of_them(x: Tensor) -> Tensor:
        for change in changes:
            x = change(x)
        return x

    return all_of_them


@pytest.mark.parametrize("seed", range(6))
def test_random_wrappers_never_share_results(seed: int, tmp_path: Path) -> None:
    draw, model, settings = random.Random(seed), linear(), config("natural", "pgd2")
    images = labelled(model, 24)
    for _ in range(5):
        before, after = random_wrapper(draw)
        wrapped = Wrap(model, lambda m, x, before=before, after=after: after(m(before(x))))
        kept = {path: path.read_text() for path in tmp_path.glob("e/*")}
        shared = run(wrapped, images, settings, folder=tmp_path / "e")
        alone = run(wrapped, images, settings)
        assert flags_of(shared) == flags_of(alone)
        assert shared["warnings"].keys() == alone["warnings"].keys()
        assert kept.keys() <= set(tmp_path.glob("e/*"))


def random_output(draw: random.Random) -> tuple[Change, str]:
    """What becomes of logits, and what it does: nothing, a fault of their values, or of their form."""
    value = draw.choice([float("nan"), float("inf")])
    row, column = draw.randrange(1, 5), draw.randrange(10)
    dtype = draw.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    kinds: list[tuple[Any, str]] = [
        (lambda z: z.to(dtype), ""),
        (lambda z: torch.cat((z, torch.full((len(z), 3), -torch.inf)), 1), ""),
        (lambda z: z.index_fill(1, torch.tensor([column]), value), "values"),
        (lambda z: torch.where((torch.arange(len(z)) % row == 0)[:, None], value, z), "values"),
        (lambda z: 0 * z - torch.inf, "values"),
        (lambda z: z[:, 0], "form"),
        (lambda z: z[None], "form"),
        (lambda z: z.argmax(1), "form"),
        (lambda z: [z], "form"),
        (lambda z: {"a": z}, "form"),
        (lambda z: z.tolist(), "form"),
        (lambda z: z.repeat(2, 1), "form"),
        (lambda z: z > 0, "form"),
    ]
    return draw.choice(kinds)


@pytest.mark.parametrize("seed", range(40))
def test_random_outputs_are_counted_right_or_refused(seed: int) -> None:
    draw, model = random.Random(seed), linear()
    x, y = labelled(model, 24)
    change, fault = random_output(draw)
    wrapped = Wrap(model, lambda m, x: change(m(x)))
    if fault == "form":
        with pytest.raises(EvaluationError, match="the model cannot be evaluated: ") as caught:
            run(wrapped, (x, y), config("natural"))
        assert "\n" not in str(caught.value)
        return
    result = run(wrapped, (x, y), config("natural", "pgd2"))
    expected = ""
    for row, label in zip(change(model(x)).float().tolist(), y.tolist(), strict=True):
        sound = all(value == value and value < float("inf") for value in row) and max(row) > -float("inf")
        expected += "1" if sound and row.index(max(row)) == label else "0"
    assert result["attacks"]["natural"]["flags"] == expected
    assert ("not_finite_logits" in result["warnings"]) is (fault == "values")


@pytest.mark.parametrize("seed", range(20))
def test_random_labels_are_right_or_refused(seed: int) -> None:
    draw, model = random.Random(seed), linear()
    x, y = labelled(model, 24)
    good, bad = flags_of(run(model, (x, y), config("natural"))), False
    for _ in range(draw.randrange(1, 3)):
        change, harm = draw.choice(
            [
                (lambda y: y.to(torch.int32), False),
                (lambda y: y.to(torch.uint8), False),
                (lambda y: y.clone(), False),
                (lambda y: y[..., None], True),
                (lambda y: y.float() + 0.5, True),
                (lambda y: y.repeat(2), True),
                (lambda y: y[1:], True),
                (lambda y: nn.functional.pad(y[:-1].long(), (0, 1), value=10), True),
                (lambda y: nn.functional.pad(y[:-1].long(), (0, 1), value=-100), True),
            ]
        )
        y = change(y)
        bad = bad or harm
        if harm:
            break
    if bad:
        with pytest.raises(EvaluationError) as caught:
            run(model, (x, y), config("natural"))
        assert "\n" not in str(caught.value)
    else:
        assert flags_of(run(model, (x, y), config("natural"))) == good
