"""The captured step against the eager one, on a fake stream of operations that a CPU can replay."""

from __future__ import annotations

from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from fake_recorder import FakeRecorder

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import fixed, margin
from mwpb_fast.config import ConfigError, OptimConfig, PrecisionConfig, load
from mwpb_fast.engine.capture import CapturedStep, check_batches
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision, make_precision
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.models import build_model
from mwpb_fast.optim import Average, make_optimizer, set_learning_rate
from mwpb_fast.perturbations import none
from mwpb_fast.step import Step, StepResult

CPU = make_precision(PrecisionConfig(device="cpu"))
BUDGET = margin.Config().build()
OBJECTIVES = ["at", "trades", "mart"]
ENGINES = ["eager", "twin"]


def make_step(objective: str = "at", engine: str = "twin", ema: float = 0.0, **options: Any) -> Step:
    torch.manual_seed(5)
    model = build_model("smallresnet-4", num_classes=10, channels=3).to(memory_format=torch.channels_last)
    net = TwinNet(model, CPU, batch(0)[0]) if engine == "twin" else EagerNet(model, CPU)
    arguments: dict[str, Any] = dict(
        model=model,
        net=net,
        attack=pgd.Config(steps=2).build(),
        objective=load("objectives", objective).Config().build(),
        perturb=none.Config().build(),
        optimizer=make_optimizer(model, OptimConfig(lr=0.1)),
        precision=CPU,
        average=Average(model, ema) if ema else None,
    )
    return Step(**{**arguments, **options})


def batch(number: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(size, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (size,), generator=generator)
    return x, y, torch.arange(size) + 100 * number, torch.tensor([ops.derive_seed(1, number)])


def capture(step: Step, **options: Any) -> CapturedStep:
    return CapturedStep(step, make_recorder=FakeRecorder, **options)


def values(step: Step) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in step.state().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_same_result(one: StepResult, other: StepResult) -> None:
    assert_same(one._asdict(), other._asdict())


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
        lambda: setattr(step, "perturb", none.Config().build()),
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


# refusals -----------------------------------------------------------------------------------------------------
def hook(step: Step, f: Any) -> Step:
    attack = step.attack

    def attacked(net: Any, x: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
        return f(attack(net, x, y, *rest), y)

    step.attack = attacked
    return step


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x, y: x * float(x.sum().item() > 0), "aten::_local_scalar_dense"),
        (lambda x, y: x if x.sum() > 0 else -x, "aten::_local_scalar_dense"),
        (lambda x, y: x + (y == 3).nonzero().sum(), "aten::nonzero"),
        (lambda x, y: x + x[y > 5].sum(), "aten::index"),
        (lambda x, y: x.index_put((y > 5,), torch.zeros(())), "aten::index_put"),
        (lambda x, y: x + x.masked_select(x > 0.5).sum(), "aten::masked_select"),
        (lambda x, y: x + y.unique().sum(), "aten::_unique2"),
        (lambda x, y: x + 0 * torch.rand_like(x), "aten::rand_like"),
        (lambda x, y: torch.nn.functional.dropout(x, 0.5), "aten::bernoulli"),
        (lambda x, y: x + x.to("meta").sum().shape.numel(), "aten::_to_copy works across devices"),
    ],
)
def test_what_waits_for_the_device_is_refused_by_name(f: Any, name: str) -> None:
    step = hook(make_step(), f)
    before = values(step)
    captured = capture(step)
    with pytest.raises(ConfigError, match=name):
        captured(*batch(0), BUDGET)
    assert_same(values(step), before)


def test_a_wait_in_the_backward_pass_is_refused_by_name() -> None:
    step = make_step()
    next(step.model.parameters()).register_hook(lambda g: g * g.abs().max().item())
    with pytest.raises(ConfigError, match="_local_scalar_dense"):
        capture(step)(*batch(0), BUDGET)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": make_precision(PrecisionConfig(device="cpu", oracle=True))}, "oracle"),
        ({"precision": Precision(torch.device("cpu"), torch.float16, torch.channels_last, False)}, "loss scaling"),
        ({"optimizer": "number"}, "learning rate is a number"),
        ({"optimizer": "late"}, "allocates its momentum"),
    ],
)
def test_what_cannot_be_captured_is_refused_at_construction(options: dict[str, Any], reason: str) -> None:
    step = make_step()
    if "optimizer" in options:
        rate = 0.1 if options["optimizer"] == "number" else torch.tensor(0.1)
        options = {"optimizer": torch.optim.SGD(step.model.parameters(), lr=rate, momentum=0.9, fused=True)}
    for name, value in options.items():
        setattr(step, name, value)
    step.__post_init__()
    with pytest.raises(ConfigError, match=reason):
        capture(step)


def test_an_axis_may_refuse() -> None:
    class Unfit:
        uncapturable = "it asks the host for the number of steps"

    with pytest.raises(ConfigError, match=r"Unfit: it asks the host"):
        capture(make_step(perturb=Unfit()))


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ConfigError, match="CUDA device"):
        CapturedStep(make_step())


def test_another_batch_size_is_refused() -> None:
    captured = capture(make_step())
    captured(*batch(0), BUDGET)
    with pytest.raises(ValueError, match="same size"):
        captured(*batch(1, size=5), BUDGET)
    check_batches(100, 25, "keep")
    check_batches(110, 25, "drop")
    with pytest.raises(ConfigError, match="leave 10 for the last batch"):
        check_batches(110, 25, "keep")
