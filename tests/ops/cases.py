"""Op cases for the generic tests: copies that keep strides, memory layouts, comparisons.

Nothing here knows an op by name, but for what has to be bit-equal: the cases come from the ops' own records.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import mwpb_kernels
import torch
from mwpb_kernels.bias_add_relu import pack
from mwpb_kernels.op import HAS_TRITON, OPS, Op

for module in pkgutil.iter_modules(mwpb_kernels.__path__):  # also ops that the package does not export
    if not module.name.startswith("lib"):
        importlib.import_module(f"mwpb_kernels.{module.name}")

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
NAMES = sorted(OPS)

# One rounding at most separates these from the reference's float32, so nothing may.
EXACT = ("linf_step_", "crop_flip", "stem_step_")
# Ops whose results hold the gate of the first one: which bits are set near zero is a matter of rounding.
GATED = ("batch_norm_relu",)
# What they give for an image depends on the others of the batch.
WHOLE_BATCH = ("batch_norm_relu", "batch_norm_relu_backward")
# (rtol, atol) between implementations and against the float64 reference, by the type of the result: some ten
# roundings of float32, and one of the half types (which compute in float32 and round once).
TOLERANCE = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (2.0**-7, 1e-6),
    torch.float16: (2.0**-10, 2.0**-24),
}


def exported(name: str) -> bool:
    """Whether an op has a public function; a module of its name, which is there by itself, is none."""
    return name in mwpb_kernels.__all__ and inspect.isfunction(getattr(mwpb_kernels, name, None))


# arguments ---------------------------------------------------------------------------------------------------
def tree(f: Callable[[torch.Tensor], Any], args: Any) -> Any:
    """`f` of every tensor in nested tuples and lists; the rest as it is."""
    if isinstance(args, torch.Tensor):
        return f(args)
    if isinstance(args, tuple | list):
        return type(args)(tree(f, a) for a in args)
    return args


def tensors(args: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists, in order."""
    found: list[torch.Tensor] = []
    tree(found.append, args)
    return found


def replace(args: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*args[:position], value, *args[position + 1 :])


def storage(t: torch.Tensor) -> torch.Tensor:
    """The whole memory behind a tensor, as a flat tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def exact_copy(args: Any, device: torch.device = CPU) -> Any:
    """Deep copy that keeps strides, offsets and whatever lies between the elements."""

    def copy(t: torch.Tensor) -> torch.Tensor:
        memory = storage(t.detach()).clone().to(device)
        out = torch.empty(0, dtype=t.dtype, device=device)
        out.set_(memory.untyped_storage(), t.storage_offset(), t.size(), t.stride())
        return out.requires_grad_(t.requires_grad)

    return tree(copy, args)


def plain_copy(args: Any) -> Any:
    """Deep copy into contiguous memory."""
    return tree(lambda t: t.detach().clone(memory_format=torch.contiguous_format), args)


def samples(op: Op, numel: int | None = None, limit: int | None = None) -> list[tuple[Any, ...]]:
    """An op's samples on the CPU; with `numel`, those that have elements and at most so many an argument."""
    found = [tuple(s) for s in op.samples(CPU)]
    if numel is not None:
        found = [s for s in found if all(0 < t.numel() <= numel for t in tensors(s))]
    return found[:limit]


# running -----------------------------------------------------------------------------------------------------
def run_reference(op: Op, args: tuple[Any, ...]) -> Any:
    return op.reference(*args)


def run_native(op: Op, args: tuple[Any, ...]) -> Any:
    return op.dispatched(*args)


def run_triton(op: Op, args: tuple[Any, ...]) -> Any:
    return op.on_cuda(*args)


RUNNERS = {"reference": run_reference, "native": run_native}
if HAS_TRITON:
    RUNNERS["triton"] = run_triton


def outcome(op: Op, args: tuple[Any, ...], runner: str = "reference") -> list[torch.Tensor]:
    """What an implementation does to a copy of the arguments: its results, then the arguments it mutated.

    Checks on the way that nothing else in memory has changed: neither the other arguments nor the gaps
    between the elements of the mutated ones.
    """
    device = TRITON_DEVICE if runner == "triton" else CPU
    mine = exact_copy(args, device)
    before = exact_copy(mine, device)
    result = RUNNERS[runner](op, mine)
    if device.type != "cpu":
        torch.cuda.synchronize()
    mutated = []
    for position, (now, then) in enumerate(zip(mine, before, strict=True)):
        for a, b in zip(tensors(now), tensors(then), strict=True):
            if position in op.mutates:
                mutated.append(a)
                b.copy_(a)
            assert torch.equal(storage(a), storage(b)), f"{runner} changed memory of argument {position}"
    return [t.detach().to(CPU) for t in (*tensors(result), *mutated)]


def compare(
    op: Op,
    actual: list[torch.Tensor],
    expected: list[torch.Tensor],
    what: str,
    args: tuple[Any, ...] | None = None,
) -> None:
    """Same shapes and types, same NaN pattern, same infinities, values within the type's tolerance.

    With `args`, where a result is a difference of nearly equal terms, so that the reference itself is not
    within the tolerance of its float64 value, a value may be four times as far off as the reference is in its
    row (itself, in a result of one dimension; in any channel, where that is a sum over the whole batch, whose
    terms are much larger than what is left of them in one channel by chance).
    """
    assert len(actual) == len(expected), what
    exact = None
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{what}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        if op.name in GATED and a.dtype == torch.uint8:
            assert torch.equal(a, pack(~(actual[0] <= 0))), f"{what}: the gate is not that of the result"
            continue
        if op.name in EXACT or not a.dtype.is_floating_point:
            rtol, atol = 0.0, 0.0
        else:
            rtol, atol = TOLERANCE[a.dtype]
        near = torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
        if args is not None and not near.all() and rtol:
            exact = exact or outcome(op, in_float64(plain_copy(args)))
            truth = exact[i].double()
            slack = torch.where(truth.isfinite(), (b.double() - truth).abs(), 0)
            together = slack.dim() > 1 or (op.name in WHOLE_BATCH and slack.numel() > 0)
            slack = slack.amax(-1, keepdim=True) if together else slack
            near |= (a.double() - truth).abs() <= 4 * slack + rtol * truth.abs() + atol
        if not near.all():
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, what=what: f"{what}\n{m}"
            )


def in_float64(args: Any) -> Any:
    """The same arguments with every floating-point tensor in float64."""
    return tree(lambda t: t.double() if t.dtype.is_floating_point else t, args)


def strides(t: torch.Tensor) -> tuple[int | None, ...]:
    """Strides that mean something: None for dimensions of size 1, and for tensors without elements."""
    return tuple(s if n > 1 and t.numel() else None for s, n in zip(t.stride(), t.shape, strict=True))


def describe(args: tuple[Any, ...]) -> str:
    return str(tree(lambda t: f"{str(t.dtype)[6:]}{tuple(t.shape)}/{t.stride()}+{t.storage_offset()}", args))


# layouts -----------------------------------------------------------------------------------------------------
def _poison_value(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def _window(t: torch.Tensor, steps: tuple[int, ...], offset: int) -> torch.Tensor:
    """`t` as every steps-th element of a larger tensor of poison, `offset` from its start."""
    shape = [n * step for n, step in zip(t.shape, steps, strict=True)]
    numel = int(torch.Size(shape).numel())
    memory = torch.full((offset + numel + 5,), _poison_value(t.dtype), dtype=t.dtype)
    view = memory[offset : offset + numel].view(shape)[tuple(slice(step - 1, None, step) for step in steps)]
    return view.copy_(t)


def _reversed(t: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _loose_unit_strides(t: torch.Tensor) -> torch.Tensor:
    """The stride of a dimension of size 1 has no meaning, so it may be anything."""
    return t.as_strided(t.shape, [7 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])


def _expanded(t: torch.Tensor, dim: int) -> torch.Tensor:
    return t.narrow(dim, 0, 1).clone().expand(t.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": _reversed,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 2 else t,
    "sliced": lambda t: _window(t, (*(1,) * (t.dim() - 1), 2), 0) if t.dim() else t,
    "stepped": lambda t: _window(t, tuple(2 + i % 2 for i in range(t.dim())), 0),
    "offset": lambda t: _loose_unit_strides(_window(t, (1,) * t.dim(), 3)),
}
EXPANDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # these change the values
    "expanded_first": lambda t: _expanded(t, 0) if t.dim() else t,
    "expanded_last": lambda t: _expanded(t, -1) if t.dim() else t,
}


def layouts(t: Any, mutated: bool = False) -> Iterator[tuple[str, Any]]:
    """Copies of a tensor (or of a list of tensors) in every layout that differs from its own."""
    for name, change in {**LAYOUTS, **({} if mutated else EXPANDED)}.items():
        changed = tree(change, plain_copy(t))
        if any(
            (a.stride(), a.storage_offset()) != (b.stride(), b.storage_offset())
            for a, b in zip(tensors(changed), tensors(t), strict=True)
        ):
            yield name, changed


def laid_out(op: Op, args: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The arguments with each one in every layout, then all of them in the same layout."""
    with_tensors = [i for i, a in enumerate(args) if tensors(a)]
    for i in with_tensors:
        for name, changed in layouts(args[i], i in op.mutates):
            yield f"argument {i} {name}", replace(args, i, changed)
    for name, change in LAYOUTS.items():
        yield f"all {name}", tree(change, plain_copy(args))


# values ------------------------------------------------------------------------------------------------------
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0)


def inject(t: torch.Tensor, values: tuple[float, ...], generator: torch.Generator) -> torch.Tensor:
    """A copy with each of the values at a random place."""
    out = t.detach().clone(memory_format=torch.contiguous_format)
    if out.numel() and values:
        places = torch.randint(out.numel(), (len(values),), generator=generator)
        out.view(-1)[places] = torch.tensor(values, dtype=out.dtype)
    return out
