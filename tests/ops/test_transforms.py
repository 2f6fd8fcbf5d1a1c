"""Forward mode, torch.func and second derivatives through every op: right or an error, never a silent zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mwpb_kernels
import pytest
import torch
from cases import (
    NAMES,
    OPS,
    compare,
    describe,
    in_float64,
    plain_copy,
    replace,
    samples,
    tensors,
    tree,
)
from mwpb_kernels.op import Op
from torch.autograd import forward_ad

CASES = [  # every place where a derivative could be asked for
    (name, position)
    for name in NAMES
    for position, argument in enumerate(samples(OPS[name])[-1])
    if any(t.dtype.is_floating_point for t in tensors(argument))
]
RIGHT = [(n, i) for n, i in CASES if i in OPS[n].differentiable]
CONSTANT = [(n, i) for n, i in CASES if i not in OPS[n].differentiable]


def case(op: Op) -> tuple[Any, ...]:
    """A small sample in float64, none of whose arguments is empty."""
    return in_float64(plain_copy(samples(op, 400)[-1]))


def function(op: Op, args: tuple[Any, ...], position: int) -> tuple[Callable[..., Any], torch.Tensor]:
    """The sum of an op's results and of what it has written as a function of one argument, and its value."""
    is_list = not isinstance(args[position], torch.Tensor)
    value = args[position][0] if is_list else args[position]

    def f(v: torch.Tensor) -> torch.Tensor:
        mine = list(tree(torch.clone, args))
        v = v.clone() if position in op.mutates else v
        mine[position] = [v, *mine[position][1:]] if is_list else v
        results = tensors(op(*mine))
        return sum(t.sin().sum() for t in (*results, *(t for i in op.mutates for t in tensors(mine[i]))))

    return f, value


def dual(f: Callable[..., Any], value: torch.Tensor) -> torch.Tensor | None:
    with forward_ad.dual_level():
        out = f(forward_ad.make_dual(value, torch.ones_like(value)))
        return forward_ad.unpack_dual(out).tangent


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "dual": dual,
    "jvp": lambda f, v: torch.func.jvp(f, (v,), (torch.ones_like(v),))[1],
    "jacfwd": lambda f, v: torch.func.jacfwd(f)(v).sum(),
    "grad": lambda f, v: torch.func.grad(f)(v).sum(),
    "jacrev": lambda f, v: torch.func.jacrev(f)(v).sum(),
    "vjp": lambda f, v: torch.func.vjp(f, v)[1](torch.ones((), dtype=v.dtype))[0].sum(),
    "linearize": lambda f, v: torch.func.linearize(f, v)[1](torch.ones_like(v)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("name", "position"), RIGHT)
def test_derivatives_under_transforms(name: str, position: int, transform: str) -> None:
    """The derivative along (1, ..., 1), against ordinary reverse mode through the op itself."""
    f, value = function(OPS[name], case(OPS[name]), position)
    leaf = value.clone().requires_grad_()
    expected = torch.autograd.grad(f(leaf), leaf)[0].sum()
    actual = TRANSFORMS[transform](f, value)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("name", "position"), CONSTANT)
def test_derivatives_of_constants_are_refused(name: str, position: int, transform: str) -> None:
    f, value = function(OPS[name], case(OPS[name]), position)
    argument = OPS[name].takes[position]
    with pytest.raises(RuntimeError, match=rf"{name} has no derivative in {argument}: pass it detached"):
        TRANSFORMS[transform](f, value)
    # which the cure mends, and what else the function depends on is not lost
    slope = TRANSFORMS[transform](lambda v: f(v.detach()) + 2 * v.sum(), value)
    assert slope == 2 * value.numel()


@pytest.mark.parametrize("name", [n for n, i in RIGHT if i == 0])
def test_second_derivatives_with_torch_func(name: str) -> None:
    """Forward over reverse and reverse over reverse agree with finite differences of the first derivative."""
    f, value = function(OPS[name], case(OPS[name]), 0)
    direction = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    forward = torch.func.jvp(torch.func.grad(f), (value,), (direction,))[1]
    reverse = torch.func.grad(lambda v: (torch.func.grad(f)(v) * direction).sum())(value)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-11)
    step = 1e-5
    ends = [torch.func.grad(f)(value + s * step * direction) for s in (1, -1)]
    torch.testing.assert_close(forward, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_equals_a_loop(name: str) -> None:
    """Over every floating-point argument at once: each is stacked twice, the second half the first reversed."""
    op = OPS[name]
    args = plain_copy(samples(op, 400)[-1])
    other = tree(
        lambda t: t.flip(0).contiguous() if t.dim() and t.dtype.is_floating_point else t, plain_copy(args)
    )
    first, second = tensors(args), tensors(other)
    mapped = [i for i, t in enumerate(first) if t.dtype.is_floating_point]
    if not mapped:
        pytest.skip("takes integers alone")

    def f(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(values)
        leaves = iter([next(given) if i in mapped else t.clone() for i, t in enumerate(first)])
        mine = tree(lambda t: next(leaves), args)
        results = tensors(op(*mine))
        return (*results, *(t for i in op.mutates for t in tensors(mine[i])))

    stacked = [torch.stack([first[i], second[i]]) for i in mapped]
    if any(isinstance(a, list) for a in args):  # PyTorch's own operations on lists of tensors have no vmap either
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.func.vmap(f)(*stacked)
        return
    batched = torch.func.vmap(f)(*stacked)
    for row, own in enumerate((first, second)):
        expected = f(*(own[i].clone() for i in mapped))
        compare(op, [t[row].contiguous() for t in batched], list(expected), describe(args), args)


@pytest.mark.parametrize("name", sorted({n for n, _ in RIGHT}))
def test_gradient_penalty_is_no_silent_zero(name: str) -> None:
    """A first derivative inside a loss: its own derivative is refused, and is there with the reference."""
    op = OPS[name]
    args = case(op)

    def penalty(forced: bool) -> torch.Tensor:
        leaf = args[0].clone().requires_grad_()
        with mwpb_kernels.force_reference(forced):
            out = tensors(op(leaf, *args[1:]))[0].sin().sum()
            first = torch.autograd.grad(out, leaf, create_graph=True)[0]
            return torch.autograd.grad(leaf.sum() + first.square().sum(), leaf)[0]

    with pytest.raises(RuntimeError, match=rf"{name} can be differentiated once; within .*force_reference\(\)"):
        penalty(False)
    f, value = function(op, args, 0)
    expected = 1 + torch.func.grad(lambda v: torch.func.grad(f)(v).square().sum())(value)
    torch.testing.assert_close(penalty(True), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("transform", ["jvp", "grad"])
@pytest.mark.parametrize("name", ["margin", "margin_radius"])
def test_transforms_inside_a_compiled_function(name: str, transform: str) -> None:
    """As outside: the derivative, or the error."""
    op = OPS[name]
    f, value = function(op, case(op), 0)
    torch.compiler.reset()
    compiled = torch.compile(lambda v: TRANSFORMS[transform](f, v), fullgraph=True, backend="aot_eager")
    if op.differentiable:
        torch.testing.assert_close(compiled(value), TRANSFORMS[transform](f, value), rtol=1e-9, atol=1e-11)
    else:
        with pytest.raises(Exception, match="has no derivative in logits"):
            compiled(value)
    torch.compiler.reset()


def test_scale_and_bias_that_ask_for_a_gradient_are_refused() -> None:
    """The gradient of scale_bias_relu is in x alone; without the error, scale.grad would stay None in silence."""
    x, scale, bias = torch.randn(2, 3, 4), torch.ones(3), torch.zeros(3)
    for position, name in ((1, "scale"), (2, "bias")):
        args = replace((x, scale, bias), position, torch.ones(3, requires_grad=True))
        with pytest.raises(ValueError, match=rf"{name} requires grad.*pass {name}.detach\(\)"):
            mwpb_kernels.scale_bias_relu(*args)
        with torch.no_grad():
            mwpb_kernels.scale_bias_relu(*args)
