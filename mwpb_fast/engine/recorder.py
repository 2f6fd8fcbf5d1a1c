"""Recording what a function does on the device, to do it again without the host: CUDA graphs, and what cannot
be in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mwpb_fast.config import ConfigError

WARM_UP = 3  # runs before a capture: libraries choose algorithms and take their memory in the first ones


class Recorder(Protocol):
    """Records a function's operations once and repeats them on the same memory."""

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run the function, in order with what was done before and what follows."""
        ...

    def capture(self, function: Callable[[], object]) -> None:
        """Record what the function does. Nothing of it is done yet; tensors that it makes are kept."""
        ...

    def replay(self) -> None:
        """Do what was recorded."""
        ...

    def close(self) -> None:
        """Forget what was recorded and free its memory."""
        ...


class CudaRecorder:
    """A CUDA graph with a memory pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, function: Callable[[], object]) -> None:
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function()
            torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, function: Callable[[], object]) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graph's pool takes none of what lies in the others
            with torch.cuda.stream(self._stream):
                self._graph = _captured(function)

    def replay(self) -> None:
        assert self._graph is not None
        with torch.cuda.device(self.device):
            self._graph.replay()

    def close(self) -> None:
        if self._graph is not None:
            torch.cuda.synchronize(self.device)  # a replay may still be running in the memory that is freed
            self._graph.reset()
            self._graph = None


def _captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What the function does on the current stream. Raises ConfigError that names the first error.

    In place of `torch.cuda.graph`: where ending a capture raises, as it does after any operation that a capture
    does not permit, that leaves the capture's stream the current one and hides the operation's own error.
    """
    graph, first = torch.cuda.CUDAGraph(), None
    # other threads, such as a loader's, may go on allocating meanwhile
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        function()
    except BaseException as error:  # whatever it is, the stream must leave its capture
        first = error
    try:
        graph.capture_end()
    except Exception as error:
        if first is not None:
            first.add_note(f"The capture could not be ended: {error}")
        first = first or error
    if first is None:
        return graph
    if isinstance(first, ConfigError | torch.OutOfMemoryError) or not isinstance(first, Exception):
        raise first
    reason = (str(first).splitlines() or [""])[0] or type(first).__name__
    raise ConfigError(f"precision.capture: the step cannot be captured: {reason}; leave it off") from first


def recorder_for(device: torch.device) -> Recorder:
    """A recorder of the device's work. Raises ConfigError where there is none."""
    if device.type != "cuda":
        raise ConfigError(f"precision.capture: CUDA graphs need a CUDA device, not {device.type}")
    return CudaRecorder(device)


class Watch(TorchDispatchMode):
    """Inside the block an operation that cannot be captured raises ConfigError with its name."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else what torch.compile has compiled would not run inside, nor any more after it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reason := why_not(func, args, kwargs):
            raise ConfigError(f"precision.capture: the step cannot be captured: {func.name()} {reason}")
        return func(*args, **kwargs)


def why_not(func: Any, args: Any, kwargs: Any) -> str:
    """Why an operation cannot be part of a captured step; "" where it can."""
    given = list(tensors((args, kwargs)))
    if torch.Tag.nondeterministic_seeded in func.tags:
        return "draws from the global generator, so a run could not be repeated"
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        masks = [t for t in tensors(args[1]) if t.dtype in (torch.bool, torch.uint8)]
        return "selects by a mask, so its shape waits for the device" if masks else _devices(given, kwargs)
    if torch.Tag.data_dependent_output in func.tags:
        return "gives a value to the host, which waits for the device"
    if torch.Tag.dynamic_output_shape in func.tags:
        return "has a result whose shape waits for the device"
    return _devices(given, kwargs)


def _devices(given: list[torch.Tensor], kwargs: Any) -> str:
    found = {t.device for t in given}
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if found and asked is not None and (asked.index is not None or all(d.type != asked.type for d in found)):
        found.add(asked)
    return f"works across devices ({', '.join(sorted(map(str, found)))})" if len(found) > 1 else ""


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)
