"""Every op on every implementation against its reference: values, layouts, gradients, NaN and infinities.

The ops and their cases are discovered, so a new op is covered by existing. The Triton kernels run on the GPU
where there is one, else through Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import mwpb_kernels
import pytest
import torch
from cases import (
    INTERPRETED,
    NAMES,
    OPS,
    RUNNERS,
    SPECIAL,
    TOLERANCE,
    compare,
    describe,
    exact_copy,
    exported,
    in_float64,
    inject,
    laid_out,
    layouts,
    outcome,
    plain_copy,
    replace,
    run_native,
    samples,
    strides,
    tensors,
    tree,
)
from mwpb_kernels.op import Op, has_float64
from torch._subclasses.fake_tensor import FakeTensorMode

FAST = [r for r in RUNNERS if r != "reference"]
# Elements an argument may have in the tests that go through many variants: odd shapes of several dimensions fit.
SMALL = 4000
# And in the tests that run in Triton's interpreter, where a block of elements takes milliseconds.
INTERPRETABLE = 30_000


def test_poison_reaches_every_allocation() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_op_is_complete(name: str) -> None:
    op = OPS[name]
    assert op.triton is not None, "no Triton implementation"
    assert op.compiles, "no ahead-of-time entry"
    assert samples(op), "no samples"
    called = exported(name) or name.endswith("_backward")  # which is inside another
    where = "mwpb_kernels/__init__.py does not export its function: add it to the imports and to __all__"
    assert called, f"{name} is an op, but {where}"
    if mwpb_kernels.native_library is not None and op.native:
        stem = op.reference.__module__.rpartition(".")[2]
        cure = f"write it in kernels/csrc/{stem}.cpp and call make setup"
        assert mwpb_kernels.implementation(name, "cpu") == "native", f"{name} has no native code: {cure}"
    types = {t.dtype for s in samples(op) for t in tensors(s) if t.dtype.is_floating_point}
    numels = {t.numel() for s in samples(op) for t in tensors(s)}
    assert 0 in numels, "no empty sample"
    assert any(n % 2 for n in numels if n > 1), "no odd sample"
    assert torch.float32 in types or not types
    for args in samples(op):
        assert op.bytes_moved(*args) >= 0
    mutable = {i for i, a in enumerate(op.dispatched._schema.arguments) if a.alias_info and a.alias_info.is_write}
    assert mutable == set(op.mutates), "the schema and `mutates` disagree"


@pytest.mark.parametrize("changed", ["margin", "__all__"])
def test_a_function_that_is_not_exported_is_told_of(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its name there is something even so: its module, if that has the op's name."""
    monkeypatch.setattr(mwpb_kernels, changed, [])
    with pytest.raises(AssertionError, match=r"margin is an op, but .* add it to the imports and to __all__"):
        test_op_is_complete("margin")


def test_missing_native_code_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mwpb_kernels, "native_library", "any")
    with (
        mwpb_kernels.force_reference(),
        pytest.raises(AssertionError, match=r"csrc/losses\.cpp and call make setup"),
    ):
        test_op_is_complete("kl_div")


@pytest.mark.parametrize("runner", FAST)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, runner: str) -> None:
    op = OPS[name]
    for args in samples(op):
        if runner == "triton" and INTERPRETED and max(t.numel() for t in tensors(args)) > INTERPRETABLE:
            continue
        compare(op, outcome(op, args, runner), outcome(op, args), describe(args), args)


@pytest.mark.parametrize("name", NAMES)
def test_reference_against_float64(name: str) -> None:
    op = OPS[name]
    for args in samples(op):
        exact = outcome(op, in_float64(args))
        for a, b in zip(outcome(op, args), exact, strict=True):
            if not a.dtype.is_floating_point:
                assert torch.equal(a, b)
                continue
            rtol, atol = TOLERANCE[a.dtype]
            torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str) -> None:
    """Every layout of every argument; the results' strides are those that the fake implementation announces."""
    op = OPS[name]
    for args in samples(op, SMALL):
        for number, (what, changed) in enumerate(laid_out(op, args)):
            expected = outcome(op, plain_copy(changed))
            with FakeTensorMode() as mode:
                fake = tensors(op.dispatched(*tree(mode.from_tensor, changed)))
            for runner in RUNNERS:
                if runner == "triton" and INTERPRETED and number % 5 and "all" not in what:
                    continue  # a fifth of the single ones in the interpreter: it is slow
                actual = outcome(op, changed, runner)
                case = f"{runner}, {what}: {describe(changed)}"
                compare(op, actual, expected, case, changed)
                for a, b in zip(actual, fake, strict=False):
                    assert (a.shape, a.dtype, strides(a)) == (b.shape, b.dtype, strides(b)), f"{case}, fake"
                    assert a.numel() <= 1 or 0 not in (s for s in strides(a) if s is not None), case


@pytest.mark.parametrize("name", NAMES)
def test_specials(name: str) -> None:
    """NaN, infinities and -0 in each argument: all implementations agree on values and on where NaN is."""
    op = OPS[name]
    generator = torch.Generator().manual_seed(1)
    for args in samples(op, SMALL):
        for position, argument in enumerate(args):
            if not any(t.dtype.is_floating_point for t in tensors(argument)):
                continue
            for values in (*((v,) for v in SPECIAL), SPECIAL):
                changed = replace(
                    args,
                    position,
                    tree(
                        lambda t, v=values: inject(t, v, generator) if t.dtype.is_floating_point else t, argument
                    ),
                )
                expected = outcome(op, changed)
                for runner in FAST:
                    what = f"{runner}, {values} in argument {position}: {describe(changed)}"
                    compare(op, outcome(op, changed, runner), expected, what, changed)


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_heap(name: str) -> None:
    """The same call twice, with different garbage in freshly allocated memory, gives the same bits."""
    op = OPS[name]
    for args in samples(op, 100_000):
        first = outcome(op, args, "native")
        torch.use_deterministic_algorithms(False)
        garbage = [torch.full((t.numel() + 8,), 3.0) for t in first for _ in range(3)]
        del garbage
        second = outcome(op, args, "native")
        torch.use_deterministic_algorithms(True, warn_only=True)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_the_result(name: str) -> None:
    op = OPS[name]
    threads = torch.get_num_threads()
    try:
        for args in samples(op):
            torch.set_num_threads(1)
            one = outcome(op, args, "native")
            torch.set_num_threads(3)
            for a, b in zip(outcome(op, args, "native"), one, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)


# gradients ---------------------------------------------------------------------------------------------------
DIFFERENTIABLE = [n for n in NAMES if OPS[n].backward is not None]


def leaves(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    mine = list(exact_copy(args))
    for i in op.differentiable:
        mine[i] = tree(lambda t: t.requires_grad_(), mine[i])
    return tuple(mine)


def gradients(op: Op, args: tuple[Any, ...], runner: Any, incoming: torch.Tensor) -> list[torch.Tensor]:
    mine = leaves(op, args)
    wanted = [t for i in op.differentiable for t in tensors(mine[i])]
    return list(torch.autograd.grad(tensors(runner(op, mine))[0], wanted, incoming))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_autograd_of_the_reference(name: str) -> None:
    """Incoming gradients in every layout, arguments in every layout."""
    op = OPS[name]
    for args in samples(op, SMALL):
        result = tensors(op.reference(*args))[0]
        incoming = torch.linspace(-1, 2, result.numel()).to(result.dtype).view(result.shape)
        for what, grad in [("contiguous", incoming), *layouts(incoming)]:
            expected = gradients(op, args, lambda o, a: o.reference(*a), plain_copy(grad))
            compare(op, gradients(op, args, run_native, grad), expected, f"{what} gradient: {describe(args)}")
        for what, changed in laid_out(op, args):
            expected = gradients(op, plain_copy(changed), lambda o, a: o.reference(*a), incoming)
            compare(op, gradients(op, changed, run_native, incoming), expected, f"{what}: {describe(changed)}")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str) -> None:
    op = OPS[name]
    checked = 0
    for args in samples(op, 200):
        mine = leaves(op, in_float64(args))
        for run in (op.dispatched, op.reference):
            assert torch.autograd.gradcheck(lambda *a, run=run: tensors(run(*a))[0], mine)
        checked += 1
    assert checked


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_gradient_alone(name: str) -> None:
    """Only some of the differentiable arguments ask for a gradient: the same values, None for the rest."""
    op = OPS[name]
    args = samples(op, SMALL)[0]
    both = leaves(op, args)
    tensors(op.dispatched(*both))[0].sum().backward()
    for i in op.differentiable:
        mine = list(exact_copy(args))
        mine[i].requires_grad_()
        tensors(op.dispatched(*mine))[0].sum().backward()
        for j in op.differentiable:
            if j == i:
                torch.testing.assert_close(mine[j].grad, both[j].grad, rtol=0, atol=0)
            else:
                assert mine[j].grad is None


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivative_is_refused(name: str) -> None:
    """The backwards are closed forms without a backward of their own: better an error than a silent zero."""
    op = OPS[name]
    mine = leaves(op, samples(op, SMALL)[0])
    wanted = [mine[i] for i in op.differentiable]
    first = torch.autograd.grad(tensors(op.dispatched(*mine))[0].sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(sum(g.sum() for g in first), wanted)


@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].backward is None])
def test_constants_carry_no_gradient(name: str) -> None:
    """Ops without a backward give constants, on every implementation, also of arguments that need gradients."""
    op = OPS[name]
    args = samples(op, SMALL)[0]
    for runner in RUNNERS.values():
        mine = list(exact_copy(args))
        for i, argument in enumerate(mine):
            if i not in op.mutates:
                mine[i] = tree(lambda t: t.requires_grad_() if t.dtype.is_floating_point else t, argument)
        for t in (*tensors(runner(op, tuple(mine))), *(t for i in op.mutates for t in tensors(mine[i]))):
            assert not t.requires_grad


@pytest.mark.parametrize("how", ["eager", "reference", "compiled"])
@pytest.mark.parametrize("name", [n for n in NAMES if OPS[n].mutates])
def test_mutation_is_seen_by_autograd(name: str, how: str) -> None:
    """A tensor that backward needs and that the op overwrites makes backward fail, as PyTorch's own ops do."""
    op = OPS[name]
    call = torch.compile(op, fullgraph=True, backend="aot_eager") if how == "compiled" else op
    mine = exact_copy(samples(op, SMALL)[0])
    changed = [t for i in op.mutates for t in tensors(mine[i])]
    weight = torch.ones((), requires_grad=True)
    product = sum((weight * t).sum() for t in changed)  # backward needs what is overwritten
    with mwpb_kernels.force_reference(how == "reference"):
        call(*mine)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    torch.compiler.reset()


def test_float64_never_reaches_triton() -> None:
    assert has_float64((1.0, torch.ones(1, dtype=torch.float64)))
    assert has_float64(([torch.ones(1)], [torch.ones(1, dtype=torch.float64)]))
    assert not has_float64((1.0, torch.ones(1)))
