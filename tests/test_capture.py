"""The captured step against the eager one, on a fake stream of operations that a CPU can replay."""

from __future__ import annotations

from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from capture_cases import (
    BUDGET,
    ENGINES,
    OBJECTIVES,
    assert_same,
    assert_same_result,
    batch,
    capture,
    make_step,
    values,
)
from fake_recorder import FakeRecorder

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import fixed, margin
from mwpb_fast.config import ConfigError, load, names
from mwpb_fast.engine.capture import CapturedStep, _same
from mwpb_fast.optim import set_learning_rate
from mwpb_fast.perturbations import awp, none


# replays ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_replay_is_the_eager_step_bit_for_bit(objective: str, engine: str) -> None:
    """Several steps, each with another batch and key, two drops of the learning rate, a change of phase."""
    eager, other = (make_step(objective, engine, ema=0.9) for _ in range(2))
    captured = capture(other)
    for number in range(6):
        budget = fixed.Config().build() if number < 2 else margin.Config().build()  # new and equal at each step
        for step in (eager, other):
            set_learning_rate(step.optimizer, 0.1 * 0.1 ** (number // 3))
        assert_same_result(eager(*batch(number), budget), captured(*batch(number), budget))
        assert_same(values(eager), values(other))
    assert captured.captures == 2
    assert other.average is not None
    assert other.average.steps == 6


def axes(kind: str) -> list[str]:
    """The modules of an axis."""
    return [name for name in names(kind) if hasattr(load(kind, name), "Config")]


def fitting(kind: str, name: str) -> dict[str, Any]:
    """Configurations of the axes, the module `name` on its own, the others such that they go with it."""

    def notes(config: Any, what: str) -> frozenset[str]:
        return getattr(config, what, frozenset())

    attacks = [pgd.Config(steps=2), pgd.Config(steps=2, count_correct=True)]
    attacks += [load("attacks", n).Config() for n in axes("attacks") if n != "pgd"]
    objectives = [load("objectives", n).Config() for n in axes("objectives")]
    perturbation = none.Config()
    if kind == "objectives":
        objectives = [load(kind, name).Config()]
    elif kind == "attacks":
        attacks = [a for a in attacks if type(a) is load(kind, name).Config]
    else:
        perturbation = load(kind, name).Config()
    for objective in objectives:
        for attack in attacks:
            met = notes(objective, "needs") <= notes(attack, "gives")
            own = getattr(attack, "own_loss", False) and not notes(objective, "needs") & notes(attack, "gives")
            if met and not own:
                return {"objectives": objective, "attacks": attack, "perturbations": perturbation}
    raise AssertionError(f"nothing goes with {name}")


EVERY = [(kind, n) for kind in ("objectives", "attacks", "perturbations") for n in axes(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_module_of_the_axes_can_be_captured_or_says_why_not(kind: str, name: str) -> None:
    """A replay is the eager step bit for bit, whatever the axes hold, now or later."""
    configs = fitting(kind, name)
    steps = []
    for _ in range(2):
        built = {k: config.build() for k, config in configs.items()}
        for one in built.values():
            if hasattr(one, "remember"):
                one.remember(400, torch.device("cpu"))
        attack, objective, perturb = built["attacks"], built["objectives"], built["perturbations"]
        steps.append(make_step(attack=attack, objective=objective, perturb=perturb))
    eager, other = steps
    if any(getattr(a, "uncapturable", "") for a in (other.attack, other.objective, other.perturb)):
        with pytest.raises(ConfigError):
            capture(other)
        return
    captured = capture(other)
    assert_same_result(captured(*batch(0), BUDGET), eager(*batch(0), BUDGET))
    for number in (1, 2, 1):
        for step in (eager, other):
            step.attack, step.objective, step.perturb = (
                a.in_epoch(100 + number) if hasattr(a, "in_epoch") else a
                for a in (step.attack, step.objective, step.perturb)
            )
        assert_same_result(captured(*batch(number), BUDGET), eager(*batch(number), BUDGET))
        assert_same(values(eager), values(other))


@pytest.mark.parametrize("position", range(4))
def test_every_input_is_read_at_each_replay(position: int) -> None:
    """With one input alone changed, the result is the eager step's with that input; it may not be remembered."""
    eager, other = make_step(), make_step()
    captured = capture(other)
    first, second = batch(0), batch(1)
    captured(*first, BUDGET)
    eager(*first, BUDGET)
    mixed = tuple(second[i] if i == position else first[i] for i in range(4))
    assert_same_result(captured(*mixed, BUDGET), eager(*mixed, BUDGET))
    assert_same(values(eager), values(other))
    for name in values(eager):
        assert not values(eager)[name].isnan().any()


def test_the_noise_differs_between_replays_and_can_be_repeated() -> None:
    x, y, index, _ = batch(0)
    losses = []
    for key in (1, 2, 1):
        step = make_step(attack=pgd.Config(steps=0, sigma=0.5).build())
        captured = capture(step)
        before = values(step)
        captured(x, y, index, torch.tensor([ops.derive_seed(7)]), BUDGET)
        for name, value in step.state().items():
            value.data.copy_(before[name])
        losses.append(captured(x, y, index, torch.tensor([key]), BUDGET).loss.item())
    assert losses[0] == losses[2] != losses[1]


def test_gather_and_augmentation_are_captured() -> None:
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (40,))

    def gather(index: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.crop_flip(images, index, order, pad=2), labels[index]

    eager, other = make_step(), make_step()
    captured = capture(other, gather=gather)
    for number in range(4):
        index, order, key = torch.randperm(40)[:6], torch.tensor([number]), torch.tensor([number + 9])
        expected = eager(*gather(index, order), index, key, BUDGET)
        assert_same_result(captured.gathered(index, order, key, BUDGET), expected)
        assert_same(values(eager), values(other))
    assert captured.captures == 1
    assert captured.verify(index, order, key, BUDGET) == []
    with pytest.raises(ValueError, match="without a gather"):
        capture(make_step()).gathered(index, order, key, BUDGET)


def test_a_step_that_is_not_finite_is_left_out_in_a_replay_too() -> None:
    eager, other = make_step(ema=0.5), make_step(ema=0.5)
    captured = capture(other)
    for number in range(4):
        x, *rest = batch(number)
        if number in (0, 2):  # the very first one, whose momentum is new, and one in the middle
            x[3, 1, 2, 2] = float("nan")
        for step in (eager, captured):
            assert step(x, *rest, BUDGET).finite.item() == (number not in (0, 2))
        assert_same(values(eager), values(other))


def test_memory_of_an_attack_is_part_of_the_state() -> None:
    class Remembering:
        def __init__(self) -> None:
            self.memory = {"radius": torch.zeros(1000)}

        def __call__(self, net: Any, x: Any, y: Any, clean: Any, radius: Any, inner: Any, key: Any, index: Any,
                     notes: Any) -> torch.Tensor:  # fmt: skip
            grown = self.memory["radius"][index] + radius
            self.memory["radius"].index_copy_(0, index, grown)
            notes["radius"] = grown
            return x

    eager, other = make_step(attack=Remembering()), make_step(attack=Remembering())
    captured = capture(other)
    for number in (0, 1, 0):
        assert_same_result(eager(*batch(number), BUDGET), captured(*batch(number), BUDGET))
        assert_same(values(eager), values(other))
    assert other.attack.memory["radius"].count_nonzero() == 12  # type: ignore[attr-defined]
    assert captured.captures == 1


# warm-up and phases -------------------------------------------------------------------------------------------
def test_warm_up_and_recording_leave_no_trace() -> None:
    step = make_step(ema=0.9)
    step(*batch(0), BUDGET)
    before, generator = values(step), torch.get_rng_state()
    captured = capture(step)
    seen: list[dict[str, torch.Tensor]] = []

    class Still(FakeRecorder):
        def replay(self) -> None:
            seen.append(values(step))

    captured._make_recorder = Still
    captured(*batch(1), BUDGET)
    assert_same(seen[0], before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert step.average is not None
    assert step.average.steps == 2  # one eager step, one call


def test_a_failure_in_the_warm_up_leaves_no_trace() -> None:
    step = make_step()
    before = values(step)
    calls = []

    def fail(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return pgd.Config(steps=1).build()(*arguments)

    step.attack = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        capture(step)(*batch(0), BUDGET)
    assert_same(values(step), before)


def test_no_gradient_exists_before_a_recording() -> None:
    step = make_step()
    step(*batch(0), BUDGET)
    existing: list[int] = []

    class Noting(FakeRecorder):
        def capture(self, function: Any) -> None:
            existing.append(sum(p.grad is not None for p in step.parameters))
            super().capture(function)

    CapturedStep(step, make_recorder=Noting)(*batch(0), BUDGET)
    assert existing == [0]


def test_each_phase_is_recorded_once_and_the_old_recording_is_freed() -> None:
    step = make_step()
    start = FakeRecorder.alive
    captured = capture(step)
    changes = (
        lambda: None,
        lambda: setattr(step, "attack", pgd.Config(steps=3).build()),
        lambda: setattr(step, "objective", load("objectives", "mart").Config().build()),
        lambda: setattr(step, "perturb", awp.Config().build()),
    )
    for count, change in enumerate(changes, start=1):
        change()
        for number in range(2):
            captured(*batch(number), margin.Config(alpha=0.3).build())
        assert captured.captures == count
        assert FakeRecorder.alive == start + 1
    captured.forget()
    assert FakeRecorder.alive == start
    assert all(p.grad is None for p in step.parameters)


def test_eager_steps_in_between_do_no_harm() -> None:
    eager, other = make_step(), make_step()
    captured = capture(other)
    for number in range(5):
        expected = eager(*batch(number), BUDGET)
        step = other if number % 2 else captured
        assert_same_result(step(*batch(number), BUDGET), expected)
        assert_same(values(eager), values(other))
    assert captured.captures == 1


def test_a_loaded_optimiser_is_recorded_anew() -> None:
    """Its state lies elsewhere then: the old recording would train on memory that is no longer read."""
    eager, other = make_step(), make_step()
    captured = capture(other)
    for number in range(4):
        if number == 2:
            for step in (eager, other):
                step.optimizer.load_state_dict(step.optimizer.state_dict())
                set_learning_rate(step.optimizer, 0.05)
        assert_same_result(captured(*batch(number), BUDGET), eager(*batch(number), BUDGET))
        assert_same(values(eager), values(other))
    assert captured.captures == 2


# verify -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_verify_finds_nothing_and_leaves_the_state(objective: str) -> None:
    step = make_step(objective, ema=0.9)
    captured = capture(step)
    before = values(step)
    assert captured.verify(*batch(0), BUDGET) == []
    assert_same(values(step), before)
    captured(*batch(0), BUDGET)
    assert captured.verify(*batch(1), BUDGET) == []
    assert captured.captures == 1


def test_verify_names_what_differs() -> None:
    """A step with a number of the host in it: a replay keeps the number, and verify shows where it went."""
    step = make_step()
    numbers = iter(range(1, 100))

    class Leaking(type(step.objective)):  # type: ignore[misc]
        def outer(self, *arguments: Any) -> torch.Tensor:
            return super().outer(*arguments) * next(numbers)

    step.objective = Leaking()
    captured = capture(step)
    captured(*batch(0), BUDGET)
    found = captured.verify(*batch(1), BUDGET)
    assert "result.loss" in found
    assert any(name.startswith("model.") for name in found)
    assert any(name.startswith("optimizer.") for name in found)
    assert "result.radius" not in found


def test_an_axis_is_the_same_throughout_a_phase() -> None:
    """Or a step would be recorded anew in each epoch."""
    iaat = load("attacks", "adaptive").Config(warmup_epochs=2).build()
    gairat = load("objectives", "gairat").Config(burn_in_epochs=2).build()
    for axis in (iaat, awp.Config(warmup_epochs=2).build(), gairat):
        one, two, three, four = (axis.in_epoch(epoch) for epoch in (1, 2, 3, 4))
        assert _same(one, two)
        assert _same(three, four)
        assert not _same(two, three)
