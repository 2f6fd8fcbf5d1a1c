"""Which implementation runs, opcheck, torch.compile, modes."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import mwpb_kernels
import pytest
import torch
from cases import NAMES, OPS, compare, describe, exact_copy, exported, outcome, samples, tensors, tree
from mwpb_kernels.op import Op, has_float64

# What the two-sample checks run on: big enough to be ordinary, small enough to be quick.
MODERATE = 50_000


def typical(op: Op) -> list[tuple[Any, ...]]:
    """Two samples: the largest moderate one, and the first small one of another type or shape."""
    found = samples(op, MODERATE)
    largest = max(range(len(found)), key=lambda i: sum(t.numel() for t in tensors(found[i])))
    others = [s for i, s in enumerate(found) if i != largest]
    return [found[largest], *others[:1]]


def asking(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy of the arguments, those that are differentiable asking for a gradient."""
    mine = exact_copy(args)
    for i in op.differentiable:
        tree(lambda t: t.requires_grad_(), mine[i])
    return mine


# opcheck and compile -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    op = OPS[name]
    for args in samples(op):
        if all(t.numel() <= MODERATE for t in tensors(args)):
            cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
            torch.library.opcheck(op.dispatched, asking(op, args), test_utils=cheap)
    for args in typical(op):
        torch.library.opcheck(op.dispatched, asking(op, args))


def public_call(op: Op) -> Callable[..., Any] | None:
    """The public function of an op, taking the op's own arguments; None for an op that is inside another."""
    if not exported(op.name):
        return None
    public = getattr(mwpb_kernels, op.name)
    names = [a.name for a in op.dispatched._schema.arguments]
    taken = [n.replace("reflect", "pad_mode") for n in names]  # a flag of the op, a name for users
    assert set(taken) <= set(inspect.signature(public).parameters), op.name

    def call(*args: Any) -> Any:
        named = dict(zip(taken, args, strict=True))
        if "reflect" in names:
            named["pad_mode"] = "reflect" if named["pad_mode"] else "zero"
        return public(**named)

    return call


def results(f: Callable[..., Any], args: tuple[Any, ...], op: Op) -> list[torch.Tensor]:
    """Results, mutated arguments and gradients of a call, in a form that `compare` takes."""
    mine = asking(op, args)
    out = tensors(f(*mine))
    if op.differentiable:
        sum(t.sum() for t in out).backward()
    gradients = [t.grad for i in op.differentiable for t in tensors(mine[i])]
    return [t.detach() for t in (*out, *(t for i in op.mutates for t in tensors(mine[i])), *gradients)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compile_whole_graph(name: str, dynamic: bool) -> None:
    op = OPS[name]
    torch.compiler.reset()
    for function in filter(None, (op, public_call(op))):
        if dynamic and function is op:
            continue
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for args in typical(op) if dynamic else typical(op)[:1]:
            compare(op, results(compiled, args, op), results(function, args, op), describe(args))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compile_with_inductor(name: str) -> None:
    op = OPS[name]
    torch.compiler.reset()
    args = typical(op)[0]
    function = public_call(op) or op

    def surrounded(*args: Any) -> Any:  # work before and after, so that the op sits inside a fused graph
        outs = tree(lambda t: t * 2 if t.is_floating_point() else t, function(*args))
        return outs

    compiled = torch.compile(surrounded, fullgraph=True)
    compare(op, results(compiled, args, op), results(surrounded, args, op), describe(args))
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(name: str, mode: Any) -> None:
    op = OPS[name]
    for args in typical(op):
        expected = outcome(op, args)
        with mode():
            mine = exact_copy(args)
            out = op(*mine)
            actual = [*tensors(out), *(t for i in op.mutates for t in tensors(mine[i]))]
        compare(op, [t.detach().clone() for t in actual], expected, describe(args))


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name: str) -> None:
    """Shape inference on the meta device, without data."""
    op = OPS[name]
    for args in samples(op):
        real = tensors(op.reference(*exact_copy(args)))
        meta = tensors(op.dispatched(*tree(lambda t: t.to("meta"), args)))
        assert [(t.shape, t.dtype) for t in meta] == [(t.shape, t.dtype) for t in real]
        assert all(t.device.type == "meta" for t in meta)


# which implementation ----------------------------------------------------------------------------------------
def test_implementation_answers() -> None:
    for name in NAMES:
        native = mwpb_kernels.native_library is not None and OPS[name].native
        assert mwpb_kernels.implementation(name) == ("native" if native else "reference")
        assert mwpb_kernels.implementation(name, torch.device("cpu")) == mwpb_kernels.implementation(name, "cpu")
        assert mwpb_kernels.implementation(name, "cuda:0") == "triton"
        assert mwpb_kernels.implementation(name, "meta") == "reference"


def test_unknown_op_is_a_key_error() -> None:
    with pytest.raises(KeyError, match=r"no op 'nonsense'; the ops are .*margin"):
        mwpb_kernels.implementation("nonsense")


def test_force_reference_holds_inside_the_block_only() -> None:
    before = mwpb_kernels.implementation("margin")
    with mwpb_kernels.force_reference():
        assert mwpb_kernels.implementation("margin") == "reference"
        assert mwpb_kernels.implementation("margin", "cuda") == "reference"
        with mwpb_kernels.force_reference(False):
            assert mwpb_kernels.implementation("margin") == before
        assert mwpb_kernels.implementation("margin") == "reference"
    assert mwpb_kernels.implementation("margin") == before
    with pytest.raises(RuntimeError, match="inside"), mwpb_kernels.force_reference():
        raise RuntimeError("inside")
    assert mwpb_kernels.implementation("margin") == before


@pytest.mark.parametrize("name", NAMES)
def test_force_reference_gives_the_reference(name: str) -> None:
    """Bit for bit what the reference function gives, and never through the native library."""
    op = OPS[name]
    for args in typical(op):
        with mwpb_kernels.force_reference():
            mine = exact_copy(args)
            out = op(*mine)
        actual = [*tensors(out), *(t for i in op.mutates for t in tensors(mine[i]))]
        for a, b in zip(actual, outcome(op, args), strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_triton_is_launched_on_its_arguments_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `cuda:1` must be made the current device for it: Triton itself looks at no argument's device."""
    op, events = OPS[name], []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        events.append(tensor)
        yield
        events.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setitem(vars(op), "triton", lambda *args: events.append("launched"))
    args = next(s for s in samples(op) if not has_float64(s))
    op.on_cuda(*args)
    assert events[0] is tensors(args)[0]
    assert events[1:] == ["launched", "left"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_dispatches_to_triton(name: str) -> None:
    op = OPS[name]
    for args in samples(op):
        mine = exact_copy(args, torch.device("cuda"))
        out = op(*mine)
        actual = [*tensors(out), *(t for i in op.mutates for t in tensors(mine[i]))]
        assert all(t.is_cuda for t in actual)
        compare(op, [t.detach().cpu() for t in actual], outcome(op, args), describe(args))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph_capture(name: str) -> None:
    """Captured and replayed, an op gives what it gives eagerly: no synchronisation, no host decision."""
    op = OPS[name]
    for args in samples(op, MODERATE):
        if any(t.dtype == torch.float64 for t in tensors(args)):
            continue
        static, start = (exact_copy(args, torch.device("cuda")) for _ in range(2))
        op(*exact_copy(args, torch.device("cuda")))  # compiles outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(*static)
        for a, b in zip(tensors(static), tensors(start), strict=True):
            a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        actual = [*tensors(out), *(t for i in op.mutates for t in tensors(static[i]))]
        compare(op, [t.detach().cpu() for t in actual], outcome(op, args), describe(args))


def test_call_overhead_is_microseconds() -> None:
    """An op without gradients never passes through Python on its way to the native code."""
    logits, labels = torch.randn(1, 10), torch.zeros(1, dtype=torch.int64)
    call = OPS["margin_radius"].dispatched
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        for _ in range(200):
            call(logits, labels, 0.03, 0.5)
        best = min(best, (time.thread_time() - start) / 200)
    assert best < 200e-6
