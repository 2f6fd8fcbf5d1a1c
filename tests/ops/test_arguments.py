"""Arguments of the public functions: all kinds of numbers work alike; what is no number or no tensor is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import mwpb_kernels as ops
import numpy as np
import pytest
import torch
from cases import NAMES, OPS, exact_copy, exported, samples, tensors
from mwpb_kernels.op import Op, check_logits

PUBLIC = [n for n in NAMES if exported(n)]
B = 3
KEY, INDEX = torch.tensor([5]), torch.arange(B)


def named(op: Op) -> dict[str, Any]:
    """A small sample of an op as keyword arguments of its public function."""
    args = dict(zip(op.takes, exact_copy(samples(op, 400)[-1]), strict=True))
    if "reflect" in args:
        args["pad_mode"] = "reflect" if args.pop("reflect") else "zero"
    return args


def scalars(name: str) -> list[str]:
    """The arguments of a public function that may be a number with a fraction: all but the ones for tensors."""
    hints = inspect.signature(getattr(ops, name)).parameters
    return [n for n, p in hints.items() if "float" in str(p.annotation).split(" | ")]


SCALARS = [(name, argument) for name in PUBLIC for argument in scalars(name)]


def run(name: str, **changed: Any) -> list[torch.Tensor]:
    args = {**named(OPS[name]), **changed}
    out = getattr(ops, name)(**args)
    return [
        t.detach().clone()
        for t in (*tensors(out), *tensors([args[OPS[name].takes[i]] for i in OPS[name].mutates]))
    ]


def test_every_kind_of_argument_is_found() -> None:
    found = {argument for _, argument in SCALARS}
    assert found == {
        *("alpha", "confidence", "eps", "floor", "gamma", "hi", "lo", "momentum", "radius", "sigma", "step_size"),
    }
    assert {n for n, _ in SCALARS} >= {"linf_step_", "l2_step_", "uniform_start", "l2_start", "margin_radius"}


@pytest.mark.parametrize(("name", "argument"), SCALARS)
def test_all_numbers_are_alike(name: str, argument: str) -> None:
    """Fraction, NumPy's scalars and 0-d tensors give what the float of the same value gives, to the bit."""
    value = {"lo": 0.125, "hi": 0.875}.get(argument, 0.5)
    kinds: list[Any] = [Fraction(value), np.float64(value), np.float32(value), torch.tensor(value)]
    kinds += [torch.tensor(value, dtype=torch.float64), torch.tensor(value, dtype=torch.bfloat16)]
    for kind in kinds:
        for a, b in zip(run(name, **{argument: kind}), run(name, **{argument: value}), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=kind: f"{k!r}: {m}")
    for kind in (Fraction(1), 1, np.int64(1), np.uint8(1), torch.tensor(1)):
        for a, b in zip(run(name, **{argument: kind}), run(name, **{argument: 1.0}), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, k=kind: f"{k!r}: {m}")


@pytest.mark.parametrize(("name", "argument"), SCALARS)
def test_what_is_no_number_is_named(name: str, argument: str) -> None:
    for wrong in (
        "8/255",
        None,
        [0.5],
        0.5j,
        True,
        Decimal("0.5"),
        np.ones(3),
        torch.tensor(True),
        torch.tensor(1j),
    ):
        with pytest.raises(TypeError, match=f"^{argument} must be "):
            run(name, **{argument: wrong})
    if "tensor" not in str(inspect.signature(getattr(ops, name)).parameters[argument].annotation).lower():
        with pytest.raises(
            TypeError, match=f"^{argument} must be a number or a 0-d real tensor on the CPU, not a"
        ):
            run(name, **{argument: torch.ones(B)})
        with pytest.raises(TypeError, match=f"^{argument} gets no gradient: pass it detached"):
            run(name, **{argument: torch.tensor(0.5, requires_grad=True)})
    with pytest.raises(TypeError, match=f"^{argument} must be .* on meta"):
        run(name, **{argument: torch.tensor(0.5, device="meta")})


def optional(name: str) -> set[str]:
    """The arguments that may be None, as the schema has it."""
    return {a.name for a in OPS[name].dispatched._schema.arguments if a.type.kind() == "OptionalType"}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_no_tensor_is_named(name: str) -> None:
    for argument, value in named(OPS[name]).items():
        if isinstance(value, torch.Tensor) and argument not in scalars(name):
            nothing = [] if argument in optional(name) else [None]
            for wrong in (*nothing, [1.0, 2.0], np.ones(3), 3, value.to_sparse()):
                with pytest.raises(TypeError, match=f"^{argument} must be "):
                    run(name, **{argument: wrong})
        elif isinstance(value, list):
            for wrong in (3, torch.ones(2, 2)):  # a tensor would pass for the list of its rows
                with pytest.raises(TypeError, match=f"^{argument} must be a list of tensors, not a "):
                    run(name, **{argument: wrong})
            with pytest.raises(TypeError, match=rf"^{argument}\[0\] must be a tensor, not float"):
                run(name, **{argument: [1.0] * len(value)})


def test_parameters_of_a_model_are_a_list() -> None:
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    moved = ops.awp_perturb_(model.parameters(), (torch.ones_like(p) for p in model.parameters()), Fraction(1, 10))
    for p, v, old in zip(model.parameters(), moved, before, strict=True):
        assert v.norm().item() == pytest.approx(0.1 * old.norm().item(), rel=1e-5)
        torch.testing.assert_close(p.detach() - old, v)
    ops.awp_restore_(model.parameters(), iter(moved))
    torch.testing.assert_close([p.detach() for p in model.parameters()], before)


def test_whole_numbers() -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    for pad in (2, np.int64(2), torch.tensor(2)):
        assert torch.equal(ops.crop_flip_params(INDEX, KEY, pad=pad), ops.crop_flip_params(INDEX, KEY, pad=2))
        ops.crop_flip(images, INDEX, KEY, pad=pad)
    calls: list[Callable[[Any], Any]] = [
        lambda pad: ops.crop_flip(images, INDEX, KEY, pad=pad),
        lambda pad: ops.crop_flip_params(INDEX, KEY, pad=pad),
    ]
    for call in calls:
        for wrong in (2.0, Fraction(2), "2", None):
            with pytest.raises(TypeError, match=r"^pad must be an integer, not "):
                call(wrong)
    with pytest.raises(TypeError, match=r"^flip must be True or False, not 'no'"):
        ops.crop_flip(images, INDEX, KEY, flip="no")  # type: ignore[arg-type]
    assert ops.derive_seed(np.int64(-3), np.int32(7)) == ops.derive_seed(-3, 7)  # type: ignore[arg-type]
    for wrong in ((1.5,), (1, "a")):
        with pytest.raises(TypeError, match="must be an integer, not"):
            ops.derive_seed(*wrong)


def test_philox_words_refuses_what_it_would_get_wrong() -> None:
    """int32 indices overflow in its products, without a word of PyTorch's."""
    for index, seed, stream, groups, error, message in (
        (INDEX.int(), KEY, 2, 1, TypeError, r"index must be \(B,\) int64, not \(3,\) torch.int32"),
        (INDEX.float(), KEY, 2, 1, TypeError, "index must be"),
        (INDEX[None], KEY, 2, 1, TypeError, "index must be"),
        ([0, 1], KEY, 2, 1, TypeError, "index must be a tensor, not list"),
        (INDEX, torch.tensor([1, 2]), 2, 1, TypeError, "seed must be an int64 tensor with one element"),
        (INDEX, 1, 2, 1, TypeError, "seed must be a tensor, not int"),
        (INDEX, KEY.to("meta"), 2, 1, ValueError, "tensors on different devices"),
        (INDEX, KEY, 2**32, 1, ValueError, "stream must be a 32-bit number"),
        (INDEX, KEY, 2, -1, ValueError, "groups not negative"),
    ):
        with pytest.raises(error, match=message):
            ops.philox_words(index, seed, stream, groups)  # type: ignore[arg-type]


def test_logits_without_labels_are_checked_as_well() -> None:
    check_logits(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="C >= 2"):
        check_logits(torch.zeros(3))
    with pytest.raises(TypeError, match="not torch"):
        check_logits(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="logits must be a tensor, not list"):
        check_logits([[0.0, 1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels must be a tensor, not NoneType"):
        ops.margin(torch.zeros(3, 2), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLIC)
def test_inference_tensors(name: str) -> None:
    """Made in inference mode and used outside of it, or the other way round: the same values."""
    expected = run(name)
    with torch.inference_mode():
        args = named(OPS[name])
        inside = run(name)
    outside = [t.clone() for t in tensors(getattr(ops, name)(**args))]
    for a, b in zip(inside, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for a, b in zip(outside, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [n for n in PUBLIC if "labels" in OPS[n].takes])
def test_labels_of_any_layout_and_of_other_types(name: str) -> None:
    expected = run(name)
    labels = named(OPS[name])["labels"]
    strided = torch.stack([labels, torch.full_like(labels, 10**6)], dim=1)[:, 0]
    for a, b in zip(run(name, labels=strided), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for wrong in (labels.int(), labels.float(), labels.to(torch.uint8), labels.bool()):
        with pytest.raises(TypeError, match="labels must be int64, not torch"):
            run(name, labels=wrong)
    for shape in ((), (len(labels), 1), (len(labels) + 1,)):
        with pytest.raises(ValueError, match=r"labels must be \(\d+,\), not "):
            run(name, labels=torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="tensors on different devices: cpu and meta"):
        run(name, labels=labels.to("meta"))
