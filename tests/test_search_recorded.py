"""The passes that AutoAttack searches by, recorded at a few sizes of batches, and what waits for the device."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from evaluate_cases import (
    one_thread,  # noqa: F401  # an autouse fixture
    package,
    short,  # noqa: F401  # a fixture
)
from fake_recorder import FakeRecorder
from search_cases import normed, search_of, watched
from torch import nn

from mwpb_fast.config import ConfigError
from mwpb_fast.engine.recorder import Watch
from mwpb_fast.evaluation import autoattack as aa
from mwpb_fast.evaluation import search as searching
from mwpb_fast.evaluation.search import sizes


@pytest.fixture
def model() -> nn.Module:
    return normed()


def test_a_changed_model_is_followed(model: nn.Module) -> None:
    target = watched(model)
    x = torch.rand(16, 1, 10, 10)
    search = search_of(target, x, record=FakeRecorder)
    assert search.holds(x)
    before = search(x)
    model.get_submodule("linear").weight.mul_(2)  # type: ignore[operator, union-attr]
    assert search.holds(x)
    assert (search(x) - before).abs().max() > 0.1
    torch.testing.assert_close(search(x), model(x), rtol=1e-4, atol=1e-4)
    search.close()


def test_sizes_are_few_and_waste_little() -> None:
    assert sizes(250) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 250]
    assert sizes(1) == [1]
    assert sizes(6) == [1, 2, 3, 4, 6]
    for count in range(1, 251):
        assert next(size for size in sizes(250) if size >= count) <= 1.5 * count


def test_recorded_passes_are_the_twins_at_every_size(model: nn.Module) -> None:
    target = watched(model)
    x = torch.rand(13, 1, 10, 10)
    search, alive = search_of(target, x, record=FakeRecorder), FakeRecorder.alive
    assert search.holds(x)
    for count in (13, 5, 1, 7, 13):
        for part in (x[:count], x[-count:]):
            leaf, other = (part.clone().requires_grad_() for _ in range(2))
            (got,) = torch.autograd.grad(search(leaf).square().sum(), leaf)
            (expected,) = torch.autograd.grad(search.twin.graph(other).square().sum(), other)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(search(part), search.twin.graph(part), rtol=1e-4, atol=1e-4)
    assert sorted(search.recorded) == [1, 6, 8, 13]
    assert FakeRecorder.alive == alive + 8
    assert search.logits(torch.rand(14, 1, 10, 10)).shape == (14, 10)  # larger than any: as it is
    search.close()
    assert FakeRecorder.alive == alive


def test_a_gradient_is_that_of_its_own_pass_whatever_came_between(model: nn.Module) -> None:
    target = watched(model)
    x = torch.rand(8, 1, 10, 10)
    search = search_of(target, x, record=FakeRecorder)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    logits = search(leaf)
    search(torch.rand(8, 1, 10, 10))
    search.close()
    (got,) = torch.autograd.grad(logits.square().sum(), leaf)
    (expected,) = torch.autograd.grad(search.twin.graph(other).square().sum(), other)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # what the attack does to logits that it was given changes nothing, as Square does
    kept = search(x)
    kept.fill_(torch.nan)
    assert search(x).isfinite().all()
    search.close()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("norm", "eps", "components"), [("linf", 0.03, ["apgd-ce", "square"]), ("l2", 0.3, ["apgd-ce", "fab-t"])]
)
def test_autoattack_is_the_same_on_recordings(
    model: nn.Module, norm: str, eps: float, components: list[str]
) -> None:
    target = watched(model)
    x = torch.rand(6, 1, 10, 10)
    y = model(x).argmax(1)
    search = search_of(target, x, record=FakeRecorder)
    target.search = search
    found = aa.autoattack(target, x, y, eps=eps, norm=norm, components=components, search=search)
    plain = aa.autoattack(target, x, y, eps=eps, norm=norm, components=components)
    assert {n: f.tolist() for n, f in found.after.items()} == {n: f.tolist() for n, f in plain.after.items()}
    assert search.recorded
    search.close()


def test_nothing_of_a_pass_waits_for_the_device(model: nn.Module) -> None:
    target = watched(model)
    x = torch.rand(8, 1, 10, 10)
    search = search_of(target, x)
    leaf = x.clone().requires_grad_()
    with Watch():
        torch.autograd.grad(search(leaf).sum(), leaf)
        search(x)
    assert target.forwards >= 16
    torch.manual_seed(3)
    theirs = package.AutoAttack(model, device="cpu").square.random_int(2, 9, [4])
    torch.manual_seed(3)
    assert torch.equal(searching._random_int(2, 9, [4]), theirs)  # on the CPU, where it indexes without a wait


def test_where_nothing_can_be_recorded_the_twin_runs_eagerly(model: nn.Module) -> None:
    class Refuses(FakeRecorder):
        def capture(self, function: Any) -> None:
            raise ConfigError("precision.capture: no")

    target = watched(model)
    x = torch.rand(8, 1, 10, 10)
    search = search_of(target, x, record=Refuses)
    with pytest.warns(RuntimeWarning, match="runs eagerly, in full float32"):
        first = search(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(search(x), first)


def test_memory_of_the_other_sizes_makes_room(model: nn.Module) -> None:
    class Small(FakeRecorder):
        def capture(self, function: Any) -> None:
            if FakeRecorder.alive > start + 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().capture(function)

        def close(self) -> None:
            if self.log is not None:
                super().close()

    start, target = FakeRecorder.alive, watched(model)
    x = torch.rand(8, 1, 10, 10)
    search = search_of(target, x, record=Small)
    for count in (8, 6, 4):
        search(x[:count])
        FakeRecorder.alive = start + 2 * len(search.recorded)
    assert list(search.recorded) == [4]
    search.close()
    FakeRecorder.alive = start
