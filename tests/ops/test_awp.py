"""The weight perturbation against its equation in float64, on all implementations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import CPU, RUNNERS, TRITON_DEVICE, tensors, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import OPS, awp_perturb_, awp_restore_, force_reference

Tensors = list[torch.Tensor]
EVERY = pytest.mark.parametrize("runner", RUNNERS)
GAMMA, EPS = 0.01, 1e-20


def call(runner: str, name: str, *args: object) -> None:
    """Run an op where the implementation runs, and bring back what it wrote."""
    device = TRITON_DEVICE if runner == "triton" else CPU
    there = tree(lambda t: t.to(device), args)
    RUNNERS[runner](OPS[name], there)
    for here, written in zip(tensors(args), tensors(there), strict=True):
        if here is not written:
            here.copy_(written)


def perturb(runner: str, params: Tensors, directions: Tensors, gamma: float = GAMMA, eps: float = EPS) -> Tensors:
    steps = [torch.full_like(p, math.nan) for p in params]
    call(runner, "awp_perturb_", params, steps, directions, gamma, eps)
    return steps


def restore(runner: str, params: Tensors, steps: Tensors) -> None:
    call(runner, "awp_restore_", params, steps)


def equation(w: torch.Tensor, d: torch.Tensor, gamma: float = GAMMA, eps: float = EPS) -> torch.Tensor:
    """v in float64 by the equation, element by element in plain sums."""
    w, d = w.double(), d.double()
    return gamma * math.sqrt((w * w).sum()) * d / (math.sqrt((d * d).sum()) + eps)


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-6 if a.dtype == torch.float32 else 1e-14, atol=0)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-6, 1.0, 100.0])
def test_hand_values(runner: str, dtype: torch.dtype, length: float) -> None:
    """w = (3, 4) has norm 5: d along w gives v = (.03, .04), and |v| = .05 along any direction of any length."""
    w, d = torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([3.0, 4.0], dtype=dtype) * length
    (v,) = perturb(runner, [w], [d])
    near(v, torch.tensor([0.03, 0.04], dtype=torch.float64))
    near(w, torch.tensor([3.03, 4.04], dtype=torch.float64))
    restore(runner, [w], [v])
    torch.testing.assert_close(w, torch.tensor([3.0, 4.0], dtype=dtype), rtol=1e-7, atol=0)
    (v,) = perturb(runner, [w], [torch.tensor([-1.0, 7.0], dtype=dtype) * length])
    near(v.norm(), torch.tensor(0.05, dtype=torch.float64))


@EVERY
def test_zero_directions_and_zero_weights_do_not_move(runner: str) -> None:
    for eps in (0.0, 1e-20):
        params = [torch.tensor([3.0, 4.0]), torch.zeros(3), torch.tensor(2.0)]
        before = [p.clone() for p in params]
        steps = perturb(runner, params, [torch.zeros(2), torch.ones(3), torch.tensor(0.0)], eps=eps)
        for p, was, v in zip(params, before, steps, strict=True):
            assert torch.equal(p, was)
            assert torch.equal(v, torch.zeros_like(v))


@EVERY
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e30])
def test_norms_neither_overflow_nor_underflow(runner: str, scale: float) -> None:
    w, d = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([2.0, -1.0, 2.0]) * scale
    (v,) = perturb(runner, [w], [d], eps=0.0)
    near(v, torch.tensor([0.1 / 3, -0.05 / 3, 0.1 / 3], dtype=torch.float64))


@EVERY
def test_eps_is_added_to_the_norm(runner: str) -> None:
    (v,) = perturb(runner, [torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.0])], eps=5.0)
    near(v, torch.tensor([0.015, 0.02], dtype=torch.float64))


@EVERY
def test_nan_stays_within_its_tensor(runner: str) -> None:
    params = [
        torch.tensor([3.0, math.nan]),
        torch.tensor([3.0, 4.0]),
        torch.tensor([3.0, 4.0]),
        torch.ones(2),
    ]
    directions = [torch.ones(2), torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 1.0]), torch.ones(2)]
    steps = perturb(runner, params, directions)
    assert [v.isnan().tolist() for v in steps] == [[True, True], [True, True], [True, False], [False, False]]
    assert steps[2][1] == 0
    near(steps[3], torch.full((2,), GAMMA, dtype=torch.float64))


@EVERY
def test_layouts_that_disagree(runner: str) -> None:
    torch.manual_seed(3)
    params = [
        torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 10)[:, ::2],
    ]
    directions = [torch.randn(4, 3, 3, 3), torch.randn(5, 6).T]
    expected = [equation(w, d) for w, d in zip(params, directions, strict=True)]
    moved = [w.double() + v for w, v in zip(params, expected, strict=True)]
    steps = perturb(runner, params, directions)
    for w, v, exact, target in zip(params, steps, expected, moved, strict=True):
        near(v, exact)
        torch.testing.assert_close(w, target.float(), rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_list_against_the_equation(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    gamma = data.draw(st.sampled_from([0.0, 0.005, 0.01, 1.0]))
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    directions = [torch.randn(shape, dtype=dtype) for shape in shapes]
    before = [p.clone() for p in params]
    steps = awp_perturb_(params, directions, gamma)
    assert len(steps) == len(params)
    for p, was, d, v in zip(params, before, directions, steps, strict=True):
        torch.testing.assert_close(v, equation(was, d, gamma).to(dtype), rtol=1e-6, atol=0)
        assert torch.equal(p, was + v)
    awp_restore_(params, steps)
    for p, was, v in zip(params, before, steps, strict=True):
        largest = torch.finfo(dtype).eps * (was.abs() + v.abs())
        assert ((p - was).abs() <= largest).all()


def test_many_pieces_sum_to_the_norm() -> None:
    """Tensors of many pieces, on any number of threads: the same bits."""
    shapes = [(700, 300), (3,), (2_000_003,), (64, 64, 3, 3)]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        params, directions = ([torch.randn(s) for s in shapes] for _ in range(2))
        expected = [equation(w, d) for w, d in zip(params, directions, strict=True)]
        steps = awp_perturb_(params, directions, GAMMA)
        for v, exact in zip(steps, expected, strict=True):
            near(v, exact)
        results.append(steps)
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# in a training loop ------------------------------------------------------------------------------------------
def test_a_step_at_the_perturbed_point_comes_back_with_its_update() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    params = [p for n, p in model.named_parameters() if p.dim() > 1 and "weight" in n]
    start = copy.deepcopy(model)
    directions = [torch.randn_like(p) for p in params]
    steps = awp_perturb_(params, directions, GAMMA)  # leaves that require grad, with grad mode on
    assert all(p.requires_grad and p.grad is None for p in params)
    assert not any(v.requires_grad for v in steps)
    model(torch.randn(5, 4)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    awp_restore_(params, steps)
    for now, was in zip(model.parameters(), start.parameters(), strict=True):
        assert now.grad is not None
        torch.testing.assert_close(now, was - 0.1 * now.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reference", [False, True])
def test_autograd_sees_the_writes(reference: bool) -> None:
    with force_reference(reference):
        w = torch.randn(3, requires_grad=True)
        square = (w * w).sum()  # backward needs w as it is
        steps = awp_perturb_([w], [torch.ones(3)], GAMMA)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()
        square = (w * w).sum()
        awp_restore_([w], steps)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()


def test_buffers_are_used_again() -> None:
    params, directions = [torch.randn(3, 2)], [torch.randn(3, 2)]
    first = awp_perturb_(params, directions, GAMMA)
    awp_restore_(params, first)
    again = awp_perturb_(params, directions, GAMMA, perturbations=first)
    assert again[0] is first[0]
    near(again[0], equation(params[0] - again[0], directions[0]))


def test_no_tensors() -> None:
    for reference in (False, True):
        with force_reference(reference):
            assert awp_perturb_([], [], GAMMA) == []
            awp_restore_([], [])
    for runner in RUNNERS:
        assert perturb(runner, [], []) == []
        restore(runner, [], [])


def test_compiles_as_a_whole() -> None:
    torch.compiler.reset()

    def there_and_back(w: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        steps = awp_perturb_([w], [d], GAMMA)
        moved = w * 2
        awp_restore_([w], steps)
        return moved, steps[0], w + 0

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    w, d = torch.randn(4, 3), torch.randn(4, 3)
    for got, expected in zip(compiled(w.clone(), d), there_and_back(w.clone(), d), strict=True):
        assert torch.equal(got, expected)
    torch.compiler.reset()


W = torch.ones(2, 3)
REFUSED = [
    (lambda: awp_perturb_([W], [], GAMMA), ValueError, "1 params need as many directions, not 0"),
    (lambda: awp_perturb_([W], [W], GAMMA, perturbations=[W, W]), ValueError, "as many perturbations, not 2"),
    (lambda: awp_perturb_([W], [W.T], GAMMA), ValueError, r"directions\[0\] must be \(2, 3\) torch.float32"),
    (lambda: awp_perturb_([W], [W.double()], GAMMA), ValueError, r"directions\[0\] must be .* not .*float64"),
    (
        lambda: awp_perturb_([W.half()], [W.half()], GAMMA),
        TypeError,
        r"params\[0\] must be float32 or float64",
    ),
    (lambda: awp_perturb_([W], [W.to("meta")], GAMMA), ValueError, "different devices"),
    (lambda: awp_perturb_([W, W.to("meta")], [W, W.to("meta")], GAMMA), ValueError, "different devices"),
    (lambda: awp_perturb_([W], [W], -0.1), ValueError, "gamma and eps must not be negative, not -0.1"),
    (lambda: awp_perturb_([W], [W], math.nan), ValueError, "gamma and eps must not be negative, not nan"),
    (lambda: awp_perturb_([W[:1].expand(2, 3)], [W], GAMMA), ValueError, r"params\[0\] is expanded"),
    (lambda: awp_restore_([W], [W, W]), ValueError, "1 params need as many perturbations, not 2"),
    (lambda: awp_restore_([W[:1].expand(2, 3)], [W]), ValueError, r"params\[0\] is expanded"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refused(case: int) -> None:
    refused, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        refused()
