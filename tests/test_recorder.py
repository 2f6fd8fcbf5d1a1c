"""The CUDA recorder's order of calls, and what counts as an operation that cannot be captured."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mwpb_fast.config import ConfigError
from mwpb_fast.engine.recorder import CudaRecorder, Watch


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Callable[[], None]]:
    """torch.cuda replaced by what notes its calls, and work that notes its stream; a capture's arguments must fit
    the real signature. After work that fails, a capture cannot be ended."""
    calls: list[str] = []
    current = [Stream("main", calls)]
    real = inspect.signature(torch.cuda.CUDAGraph.capture_begin)

    class Graph:
        def capture_begin(self, **kwargs: Any) -> None:
            mode = real.bind(None, **kwargs).arguments["capture_error_mode"]
            calls.append(f"begin on {current[-1].name}, {mode}")

        def capture_end(self) -> None:
            calls.append(f"end on {current[-1].name}")
            if "fails" in calls:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self) -> None:
            calls.append("replay")

        def reset(self) -> None:
            calls.append("reset")

    @contextlib.contextmanager
    def stream(one: Stream) -> Iterator[None]:
        current.append(one)
        try:
            yield
        finally:
            current.pop()

    for name, value in {
        "Stream": lambda device: Stream("side", calls),
        "CUDAGraph": Graph,
        "current_stream": lambda: current[-1],
        "stream": stream,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: calls.append("wait"),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return calls, lambda: calls.append(f"work on {current[-1].name}")


def test_the_order_of_a_recording(cuda: tuple[list[str], Callable[[], None]]) -> None:
    log, work = cuda
    one = CudaRecorder(torch.device("cuda"))
    one.close()  # nothing was recorded: nothing to free
    assert log == []
    one.warm_up(work)
    one.capture(work)
    one.replay()
    one.replay()
    one.close()
    one.close()
    assert log == [
        "side waits for main",
        "work on side",
        "main waits for side",
        "wait",
        "begin on side, thread_local",
        "work on side",
        "end on side",
        "replay",
        "replay",
        "wait",
        "reset",
    ]


class OwnError(Exception):
    """What a kernel's compiler may raise: no RuntimeError."""


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            RuntimeError("not permitted\nmore"),
            ConfigError,
            "the step cannot be captured: not permitted; leave it off",
        ),
        (OwnError(), ConfigError, "the step cannot be captured: OwnError; leave it off"),
        (ConfigError("its own words"), ConfigError, "its own words"),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "out of memory"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ],
)
def test_a_capture_that_fails_is_left_and_names_its_cause(
    cuda: tuple[list[str], Callable[[], None]], error: BaseException, raised: Any, message: str
) -> None:
    log, work = cuda

    def fails() -> None:
        work()
        log.append("fails")
        raise error

    one = CudaRecorder(torch.device("cuda"))
    with pytest.raises(raised, match=message) as caught:
        one.capture(fails)
    assert log[-1] == "end on side"
    assert caught.value is error or caught.value.__cause__ is error
    assert "previous error during capture" in error.__notes__[0]
    work()
    assert log[-1] == "work on main"  # what follows is not on the stream of the capture
    log.remove("fails")
    one.capture(work)
    assert log[-1] == "end on side"


def test_a_capture_that_cannot_be_ended_says_so(cuda: tuple[list[str], Callable[[], None]]) -> None:
    log, _ = cuda
    with pytest.raises(ConfigError, match="cannot be captured: operation failed due to a previous error"):
        CudaRecorder(torch.device("cuda")).capture(lambda: log.append("fails"))


X = torch.rand(4, 3)
INDEX = torch.tensor([0, 2])


@pytest.mark.parametrize(
    "f",
    [
        lambda: X[INDEX],
        lambda: X.clone().index_put_((INDEX,), torch.zeros(())),
        lambda: X.gather(0, INDEX[:, None]),
        lambda: torch.where(X > 0.5, X, 0),
        lambda: X.masked_fill(X > 0.5, 0),
        lambda: X.argmax(1).eq(0),
        lambda: torch.empty(3, device="meta").sum(),
        lambda: torch.zeros_like(X, device="cpu"),
    ],
)
def test_what_a_graph_can_hold(f: Any) -> None:
    with Watch():
        f()


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda: X.max().item(), "gives a value to the host"),
        (lambda: bool(X.any()), "gives a value to the host"),
        (lambda: torch.equal(X, X), "gives a value to the host"),
        (lambda: X[X > 0.5], "selects by a mask"),
        (lambda: X.clone().index_put_((X > 0.5,), torch.zeros(())), "selects by a mask"),
        (lambda: X.nonzero(), "shape waits for the device"),
        (lambda: X.repeat_interleave(torch.tensor([1, 2, 1, 1]), 0), "shape waits for the device"),
        (lambda: X.to("meta"), r"across devices \(cpu, meta\)"),
        (lambda: X + torch.ones((), device="meta"), "across devices"),
        (lambda: torch.randn(3), "global generator"),
        (lambda: X.bernoulli(), "global generator"),
    ],
)
def test_what_it_cannot(f: Any, reason: str) -> None:
    with Watch(), pytest.raises(ConfigError, match=reason):
        f()


def test_what_is_compiled_runs_under_the_watch_and_after_it() -> None:
    runs = []

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: (runs.append(1), graph(*args))[1]

    torch.compiler.reset()
    function, x = torch.compile(lambda x: x.sin() + 1, backend=backend), torch.ones(2)
    for turn in range(2):
        function(x)
        with Watch():
            function(x), function(x)
        function(x)
        assert len(runs) == 4 * (turn + 1)
