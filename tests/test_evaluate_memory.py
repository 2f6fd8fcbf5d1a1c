"""No memory left: an evaluation halves how many images are in the model at once, and goes on to the same flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from evaluate_cases import Wrap, config, flags_of, labelled, linear, run
from evaluate_cases import one_thread as one_thread  # an autouse fixture
from evaluate_cases import short as short  # a fixture
from torch import Tensor, nn

from mwpb_fast.evaluation.layout import faster_layout

ERRORS: dict[str, Callable[[], Exception]] = {
    "CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "Python": MemoryError,
}


class Room(torch.autograd.Function):
    """Raises where so many images are more than there is room for, forward or backward."""

    @staticmethod
    def forward(context: Any, x: Tensor, room: int, error: Callable[[], Exception], back: bool) -> Tensor:
        context.about = room, error, back
        if not back and len(x) > room:
            raise error()
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        room, error, back = context.about
        if back and len(gradient) > room:
            raise error()
        return gradient, None, None, None


def narrow(model: nn.Module, room: int, device: str = "CPU", back: bool = False) -> nn.Module:
    return Wrap(model, lambda m, x: m(Room.apply(x, room, ERRORS[device], back)))


@pytest.mark.parametrize("device", ERRORS)
@pytest.mark.parametrize("back", [False, True])
def test_halves_until_there_is_room(device: str, back: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = linear()
    images, settings = labelled(model), config("natural", "pgd5", "cw5")
    expected = run(model, images, settings)
    result = run(narrow(model, 12, device, back), images, settings)
    assert flags_of(result) == flags_of(expected)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"mwpb-fast: no memory left for {n} images at once; on with {n // 2}" for n in (40, 20)]
    assert "at most 10 images at once went through the model: no memory for more" in result["notes"]
    assert (result["batch_size"], result["warnings"]) == (250, {})
    assert [a["forwards"] for a in result["attacks"].values()] == [
        a["forwards"] for a in expected["attacks"].values()
    ]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t", "fab", "square", "pgd3-weighted", "spsa2"])
def test_every_attack_draws_what_it_would_have_drawn(attack: str) -> None:
    """Its batches stay as they were: only the model takes them in parts."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    images, settings = labelled(model, 20), config(f"{attack}@1/20", costly_subset=2)
    assert flags_of(run(narrow(model, 3), images, settings)) == flags_of(run(model, images, settings))


def test_a_single_image_that_has_no_room_ends_it() -> None:
    model = linear()
    with pytest.raises(RuntimeError, match="can't allocate"):
        run(narrow(model, 0), labelled(model), config("natural"))


def test_another_error_does_not_begin_it_anew() -> None:
    calls: list[int] = []

    def fails(m: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        return m(x if len(x) < 40 else x[0])

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(Wrap(linear(), fails), labelled(linear()), config("natural"))
    assert calls.count(40) == 1


def test_the_layout_is_measured_on_what_has_room() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 10)).eval()
    sizes: list[int] = []

    def clock(work: Callable[[], object]) -> float:
        work()
        return 1.0

    def counted(m: nn.Module, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return m(Room.apply(x, 6, ERRORS["CUDA"], False))

    assert faster_layout(Wrap(model, counted), torch.rand(20, 3, 4, 4), clock) == torch.channels_last
    assert sizes[:3] == [20, 10, 5]
