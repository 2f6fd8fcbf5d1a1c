"""Numbers that were once wrong without a word: each input gives the right value, a doubt, or one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    Wrap,
    config,
    evaluated,
    flags_of,
    labelled,
    linear,
    one_line,
    one_thread,  # noqa: F401  # an autouse fixture
    run,
    short,  # noqa: F401  # a fixture
    untrained_state,
)
from torch import Tensor, nn

from mwpb_fast import cli
from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.evaluation.score import format_table
from mwpb_fast.runs import checkpoint

# results of another function ------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


FUNCTIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "itself": lambda model, x: model(x),
    "inverted": lambda model, x: model(1 - x),
    "flipped": lambda model, x: model(x.flip(3)),
    "classes turned": lambda model, x: model(x).roll(1, 1),
    "a threshold": lambda model, x: model((x > 0.5).float() + 0 * x),
    "hotter": lambda model, x: model(x) * 1.01,
    "one logit": lambda model, x: model(x) + nn.functional.one_hot(torch.tensor(3), 10) * 0.01,
    "another gradient": lambda model, x: model(Straight.apply(x)),
    "a gradient cut in half": lambda model, x: model(x / 2 + (x / 2).detach()),
}


def test_results_of_another_function_are_never_taken(tmp_path: Path) -> None:
    """The same weights, structure and images in one folder; what differs is code, even of the gradient alone."""
    model, settings = linear(), config("natural", "pgd2")
    images = labelled(model)
    alone = {name: flags_of(run(Wrap(model, f), images, settings)) for name, f in FUNCTIONS.items()}
    assert alone["another gradient"]["natural"] == alone["itself"]["natural"]
    assert alone["another gradient"]["pgd2"] != alone["itself"]["pgd2"]
    names = [*FUNCTIONS, *random.Random(0).sample(list(FUNCTIONS), len(FUNCTIONS))]
    for name in names:
        assert (
            flags_of(run(Wrap(model, FUNCTIONS[name]), images, settings, folder=tmp_path / "e")) == alone[name]
        ), name


@pytest.mark.parametrize("value", [2.0, "wide", (1, 2), {"a": [3]}, torch.ones(2)])
def test_plain_attributes_are_part_of_the_key(value: Any, tmp_path: Path) -> None:
    """Also one that matters only for images which no probe is like."""
    model = Wrap(linear(), FUNCTIONS["itself"])
    images, settings = labelled(model), config("natural")
    run(model, images, settings, folder=tmp_path / "e")
    run(model, images, settings, folder=tmp_path / "e")
    assert len(list((tmp_path / "e").iterdir())) == 1
    model.guard = value
    run(model, images, settings, folder=tmp_path / "e")
    assert len(list((tmp_path / "e").iterdir())) == 2


def test_the_same_function_is_taken(tmp_path: Path) -> None:
    """By another object of it and with other threads, also where it draws at random."""
    model = linear()
    images = labelled(model)
    for number, function in enumerate((FUNCTIONS["itself"], lambda m, x: m(x) + 1e-3 * torch.rand(len(x), 1))):
        times = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run(Wrap(model, function), images, config("natural"), folder=tmp_path / str(number))
            times.append([path.stat().st_mtime_ns for path in (tmp_path / str(number)).iterdir()])
        assert times[0] == times[1]


def test_a_package_of_another_version_does_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = linear(), (torch.rand(4, 3, 4, 4), torch.arange(4))
    for version in ("1", "1", "2"):
        monkeypatch.setattr("mwpb_fast.evaluation.session.own_version", lambda version=version: version)
        run(model, images, config("natural"), folder=tmp_path / "e")
    assert len(list((tmp_path / "e").iterdir())) == 2


# layout ---------------------------------------------------------------------------------------------------------


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.l = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.c(x).relu().view(-1, 8 * 64))


def test_a_model_that_cannot_take_channels_last_images_gets_others() -> None:
    images = torch.rand(6, 3, 8, 8), torch.arange(6)
    result = run(Viewed().eval(), images, config("natural", "pgd2"))
    assert result["layout"] == "contiguous_format"
    assert "cannot take channels-last" in format_table(result)
    assert run(linear(), (images[0][:, :, :4, :4], images[1]), config("natural"))["layout"] == "channels_last"
    uint8 = (images[0] * 255).byte(), images[1]
    assert run(Viewed().eval(), uint8, config("natural"))["n"] == 6


def test_a_model_that_reads_memory_as_it_lies_gets_contiguous_images() -> None:
    """In channels-last ones it would see other images, and say nothing."""
    model = linear()
    raw = Wrap(model, lambda m, x: m(torch.as_strided(x, (len(x), 3, 4, 4), (48, 16, 4, 1))))
    images, settings = labelled(model), config("natural", "pgd2")
    result = run(raw, images, settings)
    assert flags_of(result) == flags_of(run(model, images, settings))
    assert result["layout"] == "contiguous_format"


def build(*, num_classes: int, channels: int) -> nn.Module:
    """As a module of a user's own, `--model.name test_evaluate_faults`."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), Flat(), nn.Linear(256, num_classes)
    )


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().view(-1, 256)


def test_layout_is_honoured_in_training_and_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--epochs=1",
        "--warmup_epochs=0",
        "--data.subset=64",
        "--optim.drops=[]",
        "--attack.steps=1",
        "--quiet",
    ]
    words = [
        "train",
        "digits.at",
        "--model.name=mwpb_viewed.net",
        "--no-evaluate",
        "--out",
        str(tmp_path / "r"),
        *small,
    ]
    package = tmp_path / "mwpb_viewed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text("from test_evaluate_faults import build as build\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert cli.main(words) == 2
        assert "cannot take channels-last images: write --precision.channels_last false" in capsys.readouterr().err
        assert cli.main([*words, "--precision.channels_last=false", "--precision.engine=eager"]) == 0
        assert evaluated(tmp_path / "r", config("natural", "pgd1", subset=20))["layout"] == "contiguous_format"
        (file,) = (tmp_path / "r" / "checkpoints").glob("best-*.pt")
        torch.save(checkpoint.read(file)["model"], tmp_path / "w.pt")
        line = ["evaluate", str(tmp_path / "w.pt"), "--recipe", "digits.at", "--model.name=mwpb_viewed.net"]
        assert cli.main([*line, "--attacks", "natural,pgd1", "--subset", "20"]) == 0
        assert "cannot take channels-last" in capsys.readouterr().out


# images and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y[:, None], r"not torch\.int64 \(40, 1\)"),
        (lambda y: nn.functional.one_hot(y, 10), r"\(40, 10\)"),
        (lambda y: y.float(), r"float32"),
        (lambda y: y > 3, r"bool"),
        (lambda y: y[:20], "40 images and 20 labels"),
        (lambda y: torch.cat((y, y)), "40 images and 80 labels"),
        (lambda y: torch.where(y == 9, -1, y), "a label is -1"),
        (lambda y: y + 5, r"labels reach 14, the model has 10 classes"),
        (lambda y: y.tolist(), "not list"),
        (lambda y: y[0], r"\(\)"),
    ],
)
def test_labels_are_checked(change: Callable[[Tensor], Any], reason: str) -> None:
    model = linear()
    x, y = labelled(model)
    y[0] = 9
    with pytest.raises(EvaluationError, match=reason):
        run(model, (x, change(y)), config("natural"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integers_are_right(dtype: torch.dtype) -> None:
    model = linear()
    x, y = labelled(model)
    expected = flags_of(run(model, (x, y), config("natural", "pgd2")))
    assert flags_of(run(model, (x, y.to(dtype)), config("natural", "pgd2"))) == expected


@pytest.mark.parametrize("x", [torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(4, 3, 8, 8).int(), [[1.0]]])
def test_images_of_another_kind_are_refused(x: Any) -> None:
    assert "images must be" in one_line(lambda: run(linear(), (x, torch.arange(4)), config("natural")))


def test_channels_that_may_lie_last_are_noted() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 10)).eval()
    for shape, noted in (((5, 5, 3), True), ((3, 5, 5), False)):
        notes = run(model, (torch.rand(4, *shape), torch.arange(4)), config("natural"))["notes"]
        assert any("are their channels last?" in note for note in notes) is noted


# previews -------------------------------------------------------------------------------------------------------


def test_a_preview_stands_beside_the_whole(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoints", "best", 3, 0, untrained_state())
    full = evaluated(tmp_path, config("natural"))
    part = evaluated(tmp_path, config("natural", subset=20))
    assert json.loads((tmp_path / "evaluation-best.json").read_text()) == full
    assert json.loads((tmp_path / "evaluation-best-preview.json").read_text()) == part
    again = evaluated(tmp_path, config("natural", "pgd1"))
    assert json.loads((tmp_path / "evaluation-best.json").read_text()) == again
