"""The captured step against the eager one, on a fake stream of operations that a CPU can replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from capture_cases import (
    AT,
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
from method_cases import Crafted, method

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import fixed, margin
from mwpb_fast.capture import CapturedStep
from mwpb_fast.config import ConfigError, axis_config, load, names
from mwpb_fast.method import Attack, Batch, Budget, Objective, Perturbation, lacking
from mwpb_fast.optim import set_learning_rate
from mwpb_fast.perturbations import awp, none


# replays ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_replay_is_the_eager_step_bit_for_bit(objective: str, engine: str) -> None:
    """Several steps, each with another batch and key, two drops of the learning rate, a change of phase."""
    eager, other = (make_step(engine, ema=0.9) for _ in range(2))
    captured = capture(other)
    for number in range(6):
        budget = fixed.Config().build() if number < 2 else margin.Config().build()  # new and equal at each step
        asked = method(objective, budget=budget)
        for step in (eager, other):
            set_learning_rate(step.optimizer, 0.1 * 0.1 ** (number // 3))
        assert_same_result(eager(*batch(number), asked), captured(*batch(number), asked))
        assert_same(values(eager), values(other))
    assert captured.captures == 2
    assert other.average is not None
    assert other.average.steps == 6


def axes(kind: str) -> list[str]:
    """The modules of an axis."""
    return [name for name in names(kind) if hasattr(load(kind, name), "Config")]


AXES = {"budgets": Budget, "attacks": Attack, "objectives": Objective, "perturbations": Perturbation}


def fitting(kind: str, name: str) -> dict[str, Any]:
    """Configurations of the axes, the module `name` on its own, the others such that they go with it."""
    attacks = [pgd.Config(steps=2), pgd.Config(steps=2, count_correct=True)]
    attacks += [axis_config("attacks", n) for n in axes("attacks") if n != "pgd"]
    objectives = [axis_config("objectives", n) for n in axes("objectives")]
    others = {"budgets": margin.Config(), "perturbations": none.Config()}
    if kind == "objectives":
        objectives = [axis_config(kind, name)]
    elif kind == "attacks":
        attacks = [a for a in attacks if type(a) is load(kind, name).Config]
    else:
        others[kind] = axis_config(kind, name)
    for objective in objectives:
        for attack in attacks:
            own = attack.own_loss and not objective.needs & attack.gives
            if objective.needs <= attack.gives and not own:
                return {"objectives": objective, "attacks": attack, **others}
    raise AssertionError(f"nothing goes with {name}")


EVERY = [(kind, n) for kind in AXES for n in axes(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_module_of_the_axes_can_be_captured_or_says_why_not(kind: str, name: str) -> None:
    """A replay is the eager step bit for bit, whatever the axes hold, now or later."""
    configs = fitting(kind, name)
    methods = []
    for _ in range(2):
        built = {k: config.build() for k, config in configs.items()}
        for k, part in built.items():
            assert not (lack := lacking(part, AXES[k])), lack
        attack, objective, perturb = built["attacks"], built["objectives"], built["perturbations"]
        methods.append(method(objective, budget=built["budgets"], attack=attack, perturb=perturb))
        methods[-1].remember(400, torch.device("cpu"))
    eager, other = make_step(), make_step()
    captured = capture(other)
    if any(axis.uncapturable for axis in methods[0].axes.values()):
        with pytest.raises(ConfigError):
            captured(*batch(0), methods[1])
        return
    for number in (0, 1, 2, 1):
        one, two = (m.in_epoch(100 + number) for m in methods)
        assert_same_result(captured(*batch(number), two), eager(*batch(number), one))
        assert_same(values(eager, one), values(other, two))


@pytest.mark.parametrize("position", range(4))
def test_every_input_is_read_at_each_replay(position: int) -> None:
    """With one input alone changed, the result is the eager step's with that input; it may not be remembered."""
    eager, other = make_step(), make_step()
    captured = capture(other)
    (first, key), (second, other_key) = batch(0), batch(1)
    captured(first, key, AT)
    eager(first, key, AT)
    flat = [*first, key]
    flat[position] = (*second, other_key)[position]
    mixed = Batch(*flat[:3]), flat[3], AT
    assert_same_result(captured(*mixed), eager(*mixed))
    assert_same(values(eager), values(other))
    for name in values(eager):
        assert not values(eager)[name].isnan().any()


def test_the_noise_differs_between_replays_and_can_be_repeated() -> None:
    images, _ = batch(0)
    losses, noisy = [], method(attack=pgd.Config(steps=0, sigma=0.5).build())
    for key in (1, 2, 1):
        step = make_step()
        captured = capture(step)
        before = values(step)
        captured(images, torch.tensor([ops.derive_seed(7)]), noisy)
        for name, value in step.state(noisy).items():
            value.data.copy_(before[name])
        losses.append(captured(images, torch.tensor([key]), noisy).loss.item())
    assert losses[0] == losses[2] != losses[1]


def test_gather_and_augmentation_are_captured() -> None:
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (40,))

    def gather(index: torch.Tensor, order: torch.Tensor) -> Batch:
        return Batch(ops.crop_flip(images, index, order, pad=2), labels[index], index)

    eager, other = make_step(), make_step()
    captured = capture(other, gather=gather)
    for number in range(4):
        index, order, key = torch.randperm(40)[:6], torch.tensor([number]), torch.tensor([number + 9])
        expected = eager(gather(index, order), key, AT)
        assert_same_result(captured.gathered(index, order, key, AT), expected)
        assert_same(values(eager), values(other))
    assert captured.captures == 1
    assert captured.verify(index, order, key, AT) == []
    with pytest.raises(ValueError, match="without a gather"):
        capture(make_step()).gathered(index, order, key, AT)


def test_a_step_that_is_not_finite_is_left_out_in_a_replay_too() -> None:
    eager, other = make_step(ema=0.5), make_step(ema=0.5)
    captured = capture(other)
    for number in range(4):
        images, key = batch(number)
        if number in (0, 2):  # the very first one, whose momentum is new, and one in the middle
            images.x[3, 1, 2, 2] = float("nan")
        for step in (eager, captured):
            assert step(images, key, AT).finite.item() == (number not in (0, 2))
        assert_same(values(eager), values(other))


def test_memory_of_an_attack_is_part_of_the_state() -> None:
    class Remembering(Attack):
        def __init__(self) -> None:
            self.memory = {"radius": torch.zeros(1000)}

        def __call__(self, net: Any, batch: Batch, clean: Any, radius: Any, inner: Any, key: Any,
                     notes: Any = None) -> torch.Tensor:  # fmt: skip
            grown = self.memory["radius"][batch.index] + radius
            self.memory["radius"].index_copy_(0, batch.index, grown)
            notes["radius"] = grown
            return batch.x

    eager, other, (one, two) = make_step(), make_step(), [method(attack=Remembering()) for _ in range(2)]
    captured = capture(other)
    for number in (0, 1, 0):
        assert_same_result(eager(*batch(number), one), captured(*batch(number), two))
        assert_same(values(eager, one), values(other, two))
    assert two.attack.memory["radius"].count_nonzero() == 12
    assert captured.captures == 1


# warm-up and phases -------------------------------------------------------------------------------------------
def test_warm_up_and_recording_leave_no_trace() -> None:
    step = make_step(ema=0.9)
    step(*batch(0), AT)
    before, generator = values(step), torch.get_rng_state()
    captured = capture(step)
    seen: list[dict[str, torch.Tensor]] = []

    class Still(FakeRecorder):
        def replay(self) -> None:
            seen.append(values(step))

    captured._make_recorder = Still
    captured(*batch(1), AT)
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

    with pytest.raises(RuntimeError, match="out of memory"):
        capture(step)(*batch(0), method(attack=Crafted(fail)))
    assert_same(values(step), before)


def test_no_gradient_exists_before_a_recording() -> None:
    step = make_step()
    step(*batch(0), AT)
    existing: list[int] = []

    class Noting(FakeRecorder):
        def capture(self, function: Any) -> None:
            existing.append(sum(p.grad is not None for p in step.parameters))
            super().capture(function)

    CapturedStep(step, make_recorder=Noting)(*batch(0), AT)
    assert existing == [0]


def test_each_phase_is_recorded_once_and_the_old_recording_is_freed() -> None:
    step = make_step()
    start = FakeRecorder.alive
    captured = capture(step)
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("budget", margin.Config(alpha=0.3).build),
        ("attack", pgd.Config(steps=3).build),
        ("objective", load("objectives", "mart").Config().build),
        ("perturb", awp.Config().build),
    ]
    for count in range(1, len(changes) + 1):
        for number in range(2):
            captured(*batch(number), method(**{axis: build() for axis, build in changes[:count]}))  # new and equal
        assert captured.captures == count
        assert FakeRecorder.alive == start + 1
    captured.forget()
    assert FakeRecorder.alive == start
    assert all(p.grad is None for p in step.parameters)


def test_eager_steps_in_between_do_no_harm() -> None:
    eager, other = make_step(), make_step()
    captured = capture(other)
    for number in range(5):
        expected = eager(*batch(number), AT)
        step = other if number % 2 else captured
        assert_same_result(step(*batch(number), AT), expected)
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
        assert_same_result(captured(*batch(number), AT), eager(*batch(number), AT))
        assert_same(values(eager), values(other))
    assert captured.captures == 2
