"""The whole outer step as one recorded graph a phase: gather and augment, attack, training pass, optimiser, EMA.

What changes from step to step is fed through tensors of fixed place: the images (or their indices, where the
images lie on the device), labels, keys, and the learning rate that the optimiser reads. All else is recorded: the
method, the modules and numbers of model and optimiser, the places of weights. It is looked at before every replay,
and where it has changed, a new recording replaces the old. The eager step stays as it is, and a replay gives its
bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from mwpb_fast.config import ConfigError
from mwpb_fast.engine.made_of import Key, MadeOf, different, plain_values
from mwpb_fast.engine.recorder import WARM_UP, Recorder, Watch, recorder_for
from mwpb_fast.method import Batch, Method
from mwpb_fast.step import Step, StepResult

Gather = Callable[[torch.Tensor, torch.Tensor], Batch]


class CapturedStep:
    """captured(batch, key, method), as the step that it is made of; or captured.gathered(...).

    step: the eager step. gather: gather(index, order) -> the batch of `index`, augmented by the key `order`,
    where the images lie on the device: then `gathered` records that too. make_recorder: what records, a CUDA graph
    by default.

    The tensors of a result are overwritten by the next call. All calls must have tensors of the shapes of the
    first. Raises ConfigError, with the reason, for a step that cannot be captured: here where that can be known
    from how it is made, else at the first call, which names the operation.
    """

    def __init__(
        self,
        step: Step,
        gather: Gather | None = None,
        make_recorder: Callable[[torch.device], Recorder] = recorder_for,
    ) -> None:
        check_capturable(step)
        self.step, self._gather, self._make_recorder = step, gather, make_recorder
        make_recorder(step.precision.device).close()  # refuses a device without graphs
        self._program: _Program | None = None
        self.captures = 0

    def __call__(self, batch: Batch, key: torch.Tensor, method: Method) -> StepResult:
        """Arguments and result as the eager step's."""
        result = self._replay(self._fed, (*batch, key), method)
        self.step.count()
        return result

    def gathered(self, index: torch.Tensor, order: torch.Tensor, key: torch.Tensor, method: Method) -> StepResult:
        """The step on the images of `index`, (B,) int64. order, key: one-element int64 tensors, the seeds of the
        augmentation and of the attack's noise."""
        result = self._replay(self._from_index, (index, order, key), method)
        self.step.count()
        return result

    def verify(self, *arguments: Any) -> list[str]:
        """Run the eager step and a replay from the same state; the names of results and state that differ in
        any bit. The state is left as it was.

        arguments: those of a call (three), or of `gathered` (four).
        """
        eager, replayed = self.outcomes(*arguments)
        return [name for name, value in eager.items() if not same_bits(value, replayed[name])]

    def outcomes(self, *arguments: Any, eager: int = 1) -> list[dict[str, torch.Tensor]]:
        """Results and state, by name, after so many eager steps and a replay, each from the same state. Arguments
        and state as in `verify`."""
        *given, method = arguments
        function: Callable[..., StepResult] = self._fed if len(given) == 2 else self._from_index
        inputs = (*given[0], given[1]) if len(given) == 2 else tuple(given)
        state = self.step.state(method)
        before = _copies(state)

        def outcome(run: Callable[[], StepResult]) -> dict[str, torch.Tensor]:
            result = run()
            after = _copies({**state, **{f"result.{k}": v for k, v in result._asdict().items()}})
            _restore(state, before)
            return after

        found = [outcome(lambda: function(*inputs, method)) for _ in range(eager)]
        return [*found, outcome(lambda: self._replay(function, inputs, method))]

    def forget(self) -> None:
        """Free what was recorded; the next call records anew."""
        _drop_gradients(self.step)
        if self._program is not None:
            self._program.close()
            self._program = None

    def _replay(
        self, function: Callable[..., StepResult], inputs: tuple[torch.Tensor, ...], method: Method
    ) -> StepResult:
        if self._program is None or not self._program.serves(function, method):
            self.forget()
            check_capturable(self.step, method)
            self._program = _Program(
                self.step, function, method, inputs, self._make_recorder(self.step.precision.device)
            )
            self.captures += 1
        return self._program(inputs)

    def _fed(self, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, *rest: Any) -> StepResult:
        return self.step.compute(Batch(x, y, index), *rest)

    def _from_index(self, index: torch.Tensor, order: torch.Tensor, *rest: Any) -> StepResult:
        if self._gather is None:
            raise ValueError("this step was made without a gather function")
        return self.step.compute(self._gather(index, order), *rest)


class _Program:
    """One recording: its inputs, its outputs, and the method that it serves."""

    def __init__(
        self,
        step: Step,
        function: Callable[..., StepResult],
        method: Method,
        inputs: tuple[torch.Tensor, ...],
        recorder: Recorder,
    ) -> None:
        self.step, self.function, self.method, self.recorder = step, function, method, recorder
        self.inputs = [t.clone() for t in inputs]
        before_it = _Baked(step, method)
        state = step.state(method)
        before = _copies(state)

        def run() -> None:
            self.result: StepResult | None = function(*self.inputs, method)

        try:
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
            # what the step's own code changes, such as a count of calls, no replay can follow
            self.own = before_it.differs()
            self.baked = _Baked(step, method)
        except BaseException:
            self.close()
            _drop_gradients(step)  # a step that goes on eagerly must not add to what a recording left
            raise

    def serves(self, function: Callable[..., StepResult], method: Method) -> bool:
        return function == self.function and method == self.method and not self.baked.differs() - self.own

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> StepResult:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if (mine.shape, mine.dtype, mine.device) != (given.shape, given.dtype, given.device):
                raise ValueError(
                    f"recorded for {mine.dtype} {tuple(mine.shape)} on {mine.device}, called with {given.dtype} "
                    f"{tuple(given.shape)} on {given.device}: every batch must have the same size"
                )
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.recorder.replay()
        assert self.result is not None  # not closed
        return self.result

    def close(self) -> None:
        self.result = None
        self.recorder.close()


def check_capturable(step: Step, method: Method | None = None) -> None:
    """Refuse a step, or a method, of which it is known that it cannot be captured. Raises ConfigError with the
    reason."""

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
    for axis in method.axes.values() if method is not None else ():
        if axis.uncapturable:
            refuse(f"{type(axis).__name__}: {axis.uncapturable}")


def check_batches(images: int, batch_size: int, last_batch: str) -> None:
    """Refuse an epoch whose last batch is smaller than the others. Raises ConfigError."""
    if last_batch == "keep" and images % batch_size:
        raise ConfigError(
            f"precision.capture: {images} training images leave {images % batch_size} for the last batch of "
            f"{batch_size}, and every batch must have the same size; take data.last_batch=drop"
        )


class _Baked:
    """What a graph of the step holds as it was when it was recorded, for good. A look at it takes the host a few
    hundred microseconds for a ResNet-18, while the device is at the step before."""

    def __init__(self, step: Step, method: Method) -> None:
        self.step, self.method, self.model = step, method, MadeOf(step.model)
        models = {"model": step.model} | ({} if step.average is None else {"average": step.average.module})
        self.modules = [
            (f"{whose} {name}", module, [k for k, v in vars(module).items() if isinstance(v, torch.Tensor)])
            for whose, model in models.items()
            for name, module in model.named_modules()
        ]
        self.rest = self._rest()

    def differs(self) -> set[Key]:
        """What of it is no longer the same."""
        return self.model.differs(set()) | different(self.rest, self._rest())

    def _rest(self) -> dict[Key, Any]:
        """By (whose, name): where tensors lie, and the values that step, optimiser and axes give to operations."""
        step, found = self.step, dict[Key, Any]()
        for whose, module, plain in self.modules:
            own = [*module._parameters.values(), *module._buffers.values(), *(vars(module).get(k) for k in plain)]
            found[whose, "places"] = _places(own)
        found["optimiser", "places"] = _places(v for kept in step.optimizer.state.values() for v in kept.values())
        for name, memory in self.method.memory.items():
            found[name, "places"] = _places(memory.values())
        owners = {name: getattr(axis, "__dict__", {}) for name, axis in self.method.axes.items()}
        for number, group in enumerate(step.optimizer.param_groups):
            found[f"group {number}", "places"] = _places(group.values())
            owners[f"group {number}"] = group
        for whose, values in (owners | {"step": vars(step)}).items():
            found |= {(whose, k): v for k, v in plain_values(values).items()}
        found["average", "decay"] = None if step.average is None else step.average.decay
        return found | {("step", k): getattr(step, k) for k in ("net", "average", "precision")}


def _places(values: Iterable[Any]) -> tuple[int | None, ...]:
    return tuple([v.data_ptr() if isinstance(v, torch.Tensor) else None for v in values])


def _copies(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


@torch.no_grad()
def _restore(values: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        value.copy_(before[name])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _drop_gradients(step: Step) -> None:
    step.optimizer.zero_grad()
    if hasattr(step.optimizer, "found_inf"):
        del step.optimizer.found_inf
