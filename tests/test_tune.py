"""The choice among a convolution's implementations: what is refused, and what is timed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from twin_cases import CPU32, Operators, needs_bf16, ours, randomise, same

from mwpb_fast.config import recipe, resolve
from mwpb_fast.engine import build
from mwpb_fast.engine import tune as tuning
from mwpb_fast.engine.layers import EPILOGUE, FUSED, PLAIN, FoldedConv, _Fused
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import TwinNet

DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


def convolutions(twin: TwinNet) -> list[FoldedConv]:
    return [layer for layer in twin.layers if isinstance(layer, FoldedConv)]


def test_choices_are_recorded_and_change_nothing() -> None:
    model, x = randomise(ours("wrn-16-2")()), torch.rand(3, 3, 16, 16)
    twin = TwinNet(model, CPU32, x)
    records = tune(twin, x, repeats=2)
    layers = convolutions(twin)
    assert [r["layer"] for r in records] == [layer.name for layer in layers]
    assert [r["chosen"] for r in records] == [layer.implementation for layer in layers]
    assert all(set(r["milliseconds"]) == {PLAIN, FUSED} and r["reason"] for r in records)
    same(twin, model, x)


def test_layer_without_fused_call_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise RuntimeError("no engine for this shape\nmore")

    monkeypatch.setattr(FoldedConv, "fused", refuse)
    model, x = randomise(ours("smallresnet-8")()), torch.rand(2, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    records = tune(twin, x, repeats=1)
    assert {r["chosen"] for r in records} == {PLAIN}
    assert {r["reason"] for r in records} == {"no fused call: no engine for this shape"}
    same(twin, model, x)


def test_a_call_that_does_not_compile_is_refused_whatever_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(FoldedConv, "fused", refuse)
    model, x = randomise(ours("smallresnet-8")()), torch.rand(2, 3, 8, 8)
    records = tune(TwinNet(model, CPU32, x), x, repeats=1)
    assert {r["reason"] for r in records} == {"no fused call: NotImplementedError"}


def test_wrong_fused_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FoldedConv, "fused", lambda self, x, skip: self.plain(x, skip) * 1.01)
    model, x = randomise(ours("smallresnet-8")()), torch.rand(2, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    records = tune(twin, x, repeats=1)
    assert {r["chosen"] for r in records} == {PLAIN}
    assert all("differs" in r["reason"] for r in records)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fastest", [PLAIN, FUSED, EPILOGUE])
def test_bias_and_relu_in_one_pass_are_a_candidate_on_cuda(
    monkeypatch: pytest.MonkeyPatch, fastest: str, dtype: torch.dtype
) -> None:
    """Where PyTorch's convolution does not add its bias itself; here as if the CPU's did not."""
    monkeypatch.setitem(tuning.CANDIDATES, "cpu", tuning.CANDIDATES["cuda"])
    times = lambda runs, *_: ({n: 1.0 if n == fastest else 2.0 for n in runs}, "")  # noqa: E731
    monkeypatch.setattr(tuning, "_measure", times)
    model, x = randomise(ours("resnet-18")()), torch.rand(4, 3, 16, 16)
    twin = TwinNet(model, CPU32, x, dtype)
    for layer, record in zip(convolutions(twin), tune(twin, x), strict=True):
        if layer.weight.dtype == layer.dtype:
            expected = fastest if fastest in record["milliseconds"] else PLAIN
            assert record["chosen"] == layer.implementation == expected
            assert set(record["milliseconds"]) == {PLAIN, FUSED, *([EPILOGUE] if layer.relu else [])}
            assert "differs" not in record["reason"]
            assert ("no epilogue call: there are no bias and ReLU" in record["reason"]) is not layer.relu
    with Operators() as operators:
        twin.input_grad(x, torch.ones_like)
    epilogues = [name for name, _ in operators.calls if name == "mwpb::scale_bias_relu"]
    assert len(epilogues) == sum(layer.implementation == EPILOGUE for layer in convolutions(twin))
    assert bool(epilogues) is (fastest == EPILOGUE)
    if dtype == torch.float32:
        same(twin, model, x)


@needs_bf16
@pytest.mark.parametrize("batch", [2, 32])
def test_relus_that_round_to_the_other_side_are_no_reason_against_a_fused_call(batch: int) -> None:
    """The fused sum is rounded once, the plain one twice, and near zero that decides which ReLUs are open."""
    model, x = randomise(ours("resnet-18")()), torch.rand(batch, 3, 8, 8)
    twin = TwinNet(model, CPU32, x, torch.bfloat16)
    records = tune(twin, x, repeats=1)
    assert not [r["reason"] for r in records if "differs" in r["reason"]]
    assert sum(bool(r["milliseconds"]) for r in records) > len(records) / 2


def scaled(gradient: Tensor) -> Tensor:
    return gradient * 1.2


def moved(gradient: Tensor) -> Tensor:
    return gradient.roll(1, 3)


def halved(gradient: Tensor) -> Tensor:
    return gradient.clone().index_fill_(0, torch.arange(len(gradient) // 2), 0)


def reasons(dtype: torch.dtype) -> dict[bool, set[str]]:
    """The first words of the reasons for the layers that end in a ReLU, and for the others."""
    twin = TwinNet(randomise(ours("smallresnet-8")()), CPU32, x := torch.rand(8, 3, 8, 8), dtype)
    layers = [layer for layer in convolutions(twin) if layer.weight.dtype == dtype]
    found = {r["layer"]: " ".join(r["reason"].split()[:4]) for r in tune(twin, x, repeats=1)}
    return {relu: {found[layer.name] for layer in layers if layer.relu is relu} for relu in (True, False)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [scaled, moved, halved])
def test_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: Any, dtype: torch.dtype) -> None:
    backward = _Fused.backward

    def changed(ctx: Any, *gradients: Tensor) -> Any:
        _, of_input, of_skip = backward(ctx, *gradients)
        return None, wrong(of_input), of_skip

    monkeypatch.setattr(_Fused, "backward", changed)
    found = reasons(dtype)
    assert found[True] == {"the fused call's gradient"}
    assert found[False] <= {"the fused call's gradient"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_through_closed_relus_is_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.ops.aten, "threshold_backward", lambda gradient, out, threshold: gradient)
    assert reasons(dtype)[True] == {"the fused call's gradient"}


# what is timed ------------------------------------------------------------------------------------------------


class Device:
    """A device with a clock of its own, on which work takes its time and launches none: they take the host's."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capturable: tuple[str, ...],
        error: Exception | None = None,
    ) -> None:
        self.now, self.log, self.capturing = 0.0, [], False
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                assert device.current == torch.device("cuda:1")
                self.at = device.now

            def synchronize(self) -> None:
                device.log.append("waits")

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        class Recorder:
            def __init__(self, on: torch.device) -> None:
                assert on == torch.device("cuda:1")
                self.work = 0.0

            def warm_up(self, function: Callable[[], object]) -> None:
                function()

            def capture(self, function: Callable[[], object]) -> None:
                before, device.capturing = device.now, True
                try:
                    function()
                finally:
                    self.work, device.now, device.capturing = device.now - before, before, False

            def replay(self) -> None:
                device.now += self.work

            def close(self) -> None:
                device.log.append("closed")

        self.current: torch.device | None = None

        @contextlib.contextmanager
        def current(one: torch.device) -> Iterator[None]:
            device.current = one
            yield
            device.current = None

        def run(name: str, launch: float, kernel: float) -> Callable[[], None]:
            def go() -> None:
                if device.capturing and name not in capturable:
                    raise error or RuntimeError("operation not permitted")
                device.now += kernel if device.capturing else max(launch, kernel)

            return go

        self.runs = {PLAIN: run(PLAIN, 5.0, 2.0), FUSED: run(FUSED, 6.0, 1.0)}
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", current)
        monkeypatch.setattr(tuning, "CudaRecorder", Recorder)


def test_on_cuda_the_kernels_are_timed_and_not_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, capturable=(PLAIN, FUSED))
    found = tuning._measure(device.runs, torch.device("cuda:1"), 3, captured=True)
    assert found == ({PLAIN: 2.0, FUSED: 1.0}, "")
    assert device.log == ["waits"] * 6 + ["closed"] * 2


def test_a_run_that_launches_its_kernels_is_timed_with_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, capturable=(PLAIN, FUSED))
    found = tuning._measure(device.runs, torch.device("cuda:1"), 3, captured=False)
    assert found == ({PLAIN: 5.0, FUSED: 6.0}, "")
    assert device.log == ["waits"] * 6  # nothing was captured


@pytest.mark.parametrize("captured", [False, True])
def test_what_is_timed_is_what_the_run_will_do(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(build, "tune", lambda net, sample, captured: seen.append(captured) or [])
    words = ["--precision.engine=twin", "--precision.tune=true", f"--precision.capture={captured}"]
    config = resolve(recipe("digits.mwpb_at"), [], words)
    build.make_engine(randomise(ours("smallresnet-8")()), config, CPU32, torch.rand(2, 3, 8, 8))
    assert seen == [captured]


@pytest.mark.parametrize("error", [RuntimeError("not permitted\nmore"), NotImplementedError("not permitted")])
@pytest.mark.parametrize("capturable", [(), (PLAIN,), (FUSED,)])
def test_what_cannot_be_captured_is_timed_with_its_launches(
    monkeypatch: pytest.MonkeyPatch, capturable: tuple[str, ...], error: Exception
) -> None:
    device = Device(monkeypatch, capturable, error)
    found = tuning._measure(device.runs, torch.device("cuda:1"), 3, captured=True)
    assert found == ({PLAIN: 5.0, FUSED: 6.0}, "not permitted")
    assert device.log.count("closed") == (2 if capturable == (PLAIN,) else 1)


@pytest.mark.parametrize("measured", [False, True])
def test_cudnns_own_choice_is_recorded(monkeypatch: pytest.MonkeyPatch, measured: bool) -> None:
    twin = TwinNet(randomise(ours("smallresnet-8")()), CPU32, x := torch.rand(2, 3, 8, 8))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", measured)
    assert {r["cudnn_benchmark"] for r in tune(twin, x, repeats=1)} == {measured}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_on_a_gpu_is_captured_and_agrees(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    captured = []

    def recorded(runs: Any, device: Any, stack: Any) -> Any:
        work = real(runs, device, stack)
        captured.append([getattr(f, "__name__", "") == "replay" for f in work.values()])
        return work

    real = tuning._recorded
    monkeypatch.setattr(tuning, "_recorded", recorded)
    precision = dataclasses.replace(CPU32, device=torch.device("cuda"), dtype=dtype, benchmark=True)
    model, x = randomise(ours("resnet-18")()).cuda(), torch.rand(32, 3, 32, 32, device="cuda")
    with precision.mode():
        records = tune(TwinNet(model.to(memory_format=torch.channels_last), precision, x), x, captured=True)
    assert captured
    assert all(all(work) for work in captured)
    assert not [r["reason"] for r in records if "differs" in r["reason"]]
    assert all(r["milliseconds"][PLAIN] > 0 for r in records if r["milliseconds"])
