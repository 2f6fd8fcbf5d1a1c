"""The whole outer step as one recorded graph a phase: gather and augment, attack, training pass, optimiser, EMA.

What changes from step to step is fed through tensors of fixed place: the images (or their indices, where the
images lie on the device), labels, keys, and the learning rate that the optimiser reads. The budget, the attack,
the objective and the weight perturbation are recorded; where one of them changes, a new recording replaces the
old. The eager step stays as it is, and a replay gives the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from mwpb_fast.config import ConfigError
from mwpb_fast.engine.recorder import WARM_UP, Recorder, Watch, recorder_for

Gather = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Capturable(Protocol):
    """What a step must offer; `mwpb_fast.step.Step` does."""

    objective: Any
    optimizer: torch.optim.Optimizer
    precision: Any
    scaler: torch.amp.GradScaler

    @property
    def attack(self) -> Any: ...

    @property
    def perturb(self) -> Any: ...

    def compute(self, x: Any, y: Any, index: Any, key: Any, budget: Any) -> Any:
        """The step's work on the device; a named tuple of tensors."""
        ...

    def count(self) -> None:
        """The host's part, after each step."""
        ...

    def state(self) -> Mapping[str, torch.Tensor]:
        """Every tensor that outlives a step and is changed by it, by name."""
        ...


class CapturedStep:
    """captured(x, y, index, key, budget), as the step that it is made of; or captured.gathered(...).

    step: the eager step. gather: gather(index, order) -> (x, y), the images and labels of `index`, augmented by
    the key `order`, where they lie on the device: then `gathered` records that too. make_recorder: what records,
    a CUDA graph by default.

    The tensors of a result are overwritten by the next call. All calls must have tensors of the shapes of the
    first. Raises ConfigError, with the reason, for a step that cannot be captured: here where that can be known
    from how it is made, else at the first call, which names the operation.
    """

    def __init__(
        self,
        step: Capturable,
        gather: Gather | None = None,
        make_recorder: Callable[[torch.device], Recorder] = recorder_for,
    ) -> None:
        check_capturable(step)
        self.step, self._gather, self._make_recorder = step, gather, make_recorder
        make_recorder(step.precision.device).close()  # refuses a device without graphs
        self._program: _Program | None = None
        self.captures = 0

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, key: torch.Tensor, budget: Any
    ) -> Any:
        """Arguments and result as the eager step's."""
        return self._run(self._fed, (x, y, index, key), budget)

    def gathered(self, index: torch.Tensor, order: torch.Tensor, key: torch.Tensor, budget: Any) -> Any:
        """The step on the images of `index`, (B,) int64. order, key: one-element int64 tensors, the seeds of the
        augmentation and of the attack's noise."""
        return self._run(self._from_index, (index, order, key), budget)

    def verify(self, *arguments: Any) -> list[str]:
        """Run the eager step and a replay from the same state; the names of results and state that differ in
        any bit. The state is left as it was.

        arguments: those of a call (five), or of `gathered` (four).
        """
        *inputs, budget = arguments
        function: Callable[..., Any] = self._fed if len(inputs) == 4 else self._from_index
        state = self.step.state()
        before = _copies(state)

        def outcome(run: Callable[[], Any]) -> dict[str, torch.Tensor]:
            result = run()
            after = _copies({**state, **{f"result.{k}": v for k, v in result._asdict().items()}})
            _restore(state, before)
            return after

        eager = outcome(lambda: function(*inputs, budget))
        replayed = outcome(lambda: self._replay(function, tuple(inputs), budget))
        return [name for name, value in eager.items() if not _same_bits(value, replayed[name])]

    def forget(self) -> None:
        """Free what was recorded; the next call records anew."""
        _drop_gradients(self.step)
        if self._program is not None:
            self._program.close()
            self._program = None

    def _run(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], budget: Any) -> Any:
        result = self._replay(function, inputs, budget)
        self.step.count()
        return result

    def _replay(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], budget: Any) -> Any:
        step = self.step
        rates = [group["lr"] for group in step.optimizer.param_groups]  # other tensors after a load of its state
        phase = [function, budget, step.attack, step.objective, step.perturb, *rates]
        if self._program is None or not self._program.serves(phase):
            self.forget()
            check_capturable(step)
            recorder = self._make_recorder(step.precision.device)
            self._program = _Program(step, phase, lambda *fed: function(*fed, budget), inputs, recorder)
            self.captures += 1
        return self._program(inputs)

    def _fed(self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, key: torch.Tensor, budget: Any) -> Any:
        return self.step.compute(x, y, index, key, budget)

    def _from_index(self, index: torch.Tensor, order: torch.Tensor, key: torch.Tensor, budget: Any) -> Any:
        if self._gather is None:
            raise ValueError("this step was made without a gather function")
        x, y = self._gather(index, order)
        return self.step.compute(x, y, index, key, budget)


class _Program:
    """One recording: its inputs, its outputs, and the phase that it serves."""

    def __init__(
        self,
        step: Capturable,
        phase: list[Any],
        function: Callable[..., Any],
        inputs: tuple[torch.Tensor, ...],
        recorder: Recorder,
    ) -> None:
        self.phase, self.recorder = phase, recorder
        self.inputs = [t.clone() for t in inputs]
        state = step.state()
        before = _copies(state)

        def run() -> None:
            self.result = function(*self.inputs)

        try:
            for number in range(WARM_UP):
                # the first run may make what is made once, such as a table on the device
                with Watch() if number == 1 else contextlib.nullcontext():
                    recorder.warm_up(run)
        finally:
            _restore(state, before)
        # a gradient must not exist before the recording, so that backward makes it in the graph's own memory
        _drop_gradients(step)
        recorder.capture(run)

    def serves(self, phase: list[Any]) -> bool:
        return len(phase) == len(self.phase) and all(map(_same, phase, self.phase))

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if (mine.shape, mine.dtype, mine.device) != (given.shape, given.dtype, given.device):
                raise ValueError(
                    f"recorded for {mine.dtype} {tuple(mine.shape)} on {mine.device}, called with {given.dtype} "
                    f"{tuple(given.shape)} on {given.device}: every batch must have the same size"
                )
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.recorder.replay()
        return self.result

    def close(self) -> None:
        self.result = None
        self.recorder.close()


def check_capturable(step: Capturable) -> None:
    """Refuse a step of which it is known that it cannot be captured. Raises ConfigError with the reason."""

    def refuse(reason: str) -> None:
        raise ConfigError(f"precision.capture: {reason}")

    if step.precision.oracle:
        refuse("the oracle runs eagerly")
    if step.scaler.is_enabled():
        refuse("the loss scaling of fp16 looks at values on the host; take precision.dtype bf16 or fp32")
    if any(not isinstance(group["lr"], torch.Tensor) for group in step.optimizer.param_groups):
        refuse("the optimiser's learning rate is a number, which a graph would keep; take optim.fused=torch")
    for group in step.optimizer.param_groups:
        for parameter in group["params"]:
            if group.get("momentum") and step.optimizer.state[parameter].get("momentum_buffer") is None:
                refuse("the optimiser allocates its momentum in the first step; allocate it before")
    for axis in (step.attack, step.objective, step.perturb):
        if reason := getattr(axis, "uncapturable", ""):
            refuse(f"{type(axis).__name__}: {reason}")


def check_batches(images: int, batch_size: int, last_batch: str) -> None:
    """Refuse an epoch whose last batch is smaller than the others. Raises ConfigError."""
    if last_batch == "keep" and images % batch_size:
        raise ConfigError(
            f"precision.capture: {images} training images leave {images % batch_size} for the last batch of "
            f"{batch_size}, and every batch must have the same size; take data.last_batch=drop"
        )


def _same(one: Any, other: Any) -> bool:
    """The same object, or equal ones that hold nothing but values; tensors are compared by identity."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or type(one) is not type(other):
        return False
    try:
        return hash(one) == hash(other) and bool(one == other)
    except TypeError:  # it holds something that may change
        return False


def _copies(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


@torch.no_grad()
def _restore(values: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        value.copy_(before[name])


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _drop_gradients(step: Capturable) -> None:
    step.optimizer.zero_grad(set_to_none=True)
    if hasattr(step.optimizer, "found_inf"):
        del step.optimizer.found_inf
