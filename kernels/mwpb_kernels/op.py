"""The record that every fused op is made of, and the dispatch between its implementations.

An op has one schema, `mwpb::name`. Its reference in plain PyTorch serves every device; the native library
replaces it on the CPU and Triton on CUDA, through PyTorch's own dispatcher. Tests and benchmarks find the ops
by their records, so an op is covered by existing.
"""

from __future__ import annotations

import contextlib
import logging
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mwpb_kernels import late
from mwpb_kernels.late import HAS_TRITON
from mwpb_kernels.late import tl as tl
from mwpb_kernels.late import triton as triton
from mwpb_kernels.transforms import carries_derivative, transformed

LIBRARY = torch.library.Library("mwpb", "DEF")
OPS: dict[str, Op] = {}
# By kind of device, why its ops run as the reference; an entry goes once that was said, at the first of them.
unsaid: dict[str, str] = {"cuda": late.problem} if late.problem else {}
late.NAMESPACES.append(globals())  # from which the ops' files take `triton` and `tl`
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMAGE_DTYPES = (torch.float32, torch.float64)

# MWPB_IMPL may be one of these; empty, it counts as unset.
IMPLEMENTATIONS = ("reference",)
if (_asked := os.environ.get("MWPB_IMPL", "")) and _asked not in IMPLEMENTATIONS:
    raise ImportError(f"MWPB_IMPL={_asked!r}: the only value is 'reference'; leave it unset for the fastest")
_forced_reference = _asked == "reference"


@dataclass(frozen=True, kw_only=True)
class Compile:
    """A Triton kernel and the types with which it is compiled ahead of time, to check registers and spills."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    max_registers: int = 128

    def __post_init__(self) -> None:
        late.NAMESPACES.append(vars(self))


@dataclass(frozen=True, kw_only=True)
class Op:
    """One fused op.

    schema: PyTorch schema without the namespace. reference: plain PyTorch, any device. fake: shapes only.
    samples: yields argument tuples for a device. bytes_moved: bytes that must move for the given arguments.
    triton: launcher with the same arguments; never handed float64. setup_context, backward: as
    `torch.library.register_autograd` takes them; an op without a backward gives outputs that carry no gradient.
    differentiable: positions of the arguments for which gradients exist. mutates: positions of the arguments
    written in place. native: False where nothing of ours serves the CPU better than the reference does. fit: makes
    arguments of any sizes go together, where a size follows from others.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[torch.device], Iterator[tuple[Any, ...]]]
    bytes_moved: Callable[..., int]
    triton: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    differentiable: tuple[int, ...] = ()
    mutates: tuple[int, ...] = ()
    compiles: tuple[Compile, ...] = ()
    native: bool = True
    fit: Callable[..., tuple[Any, ...]] | None = None
    name: str = field(init=False)
    takes: tuple[str, ...] = field(init=False)  # the arguments' names
    dispatched: Any = field(init=False)  # the overload registered with PyTorch's dispatcher

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.schema.split("(")[0])
        LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self.on_any, "CompositeExplicitAutograd")
        if self.triton is not None and HAS_TRITON:
            LIBRARY.impl(self.name, self.on_cuda, "CUDA")
        torch.library.register_fake(f"mwpb::{self.name}", self.fake, lib=LIBRARY)
        if self.backward is not None:
            torch.library.register_autograd(
                f"mwpb::{self.name}", self.backward_once, setup_context=self.setup_context, lib=LIBRARY
            )
        else:  # The result is a constant of the attack: no gradient flows, and dispatch stays out of Python.
            LIBRARY.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        object.__setattr__(self, "dispatched", getattr(torch.ops.mwpb, self.name).default)
        object.__setattr__(self, "takes", tuple(a.name for a in self.dispatched._schema.arguments))
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if transformed():
            # plain PyTorch is right under every transform, where a fused op would give a silent zero
            self.refuse_derivatives(args)
            return self.reference(*args)
        if _forced_reference:
            return self.reference(*args)
        result = self.dispatched(*args)
        if self.mutates and not torch.compiler.is_compiling():  # a compiled graph's writes are seen by autograd
            for position in self.mutates:
                # the dispatcher did not count the write: without this, backward would use what was overwritten
                torch.autograd.graph.increment_version(args[position])
        return result

    def refuse_derivatives(self, args: tuple[Any, ...]) -> None:
        """Refuse to differentiate in a constant, where nothing on the result would show that it is one."""
        for position, value in enumerate(args):
            if position not in self.differentiable and any(carries_derivative(t) for t in tensors_in((value,))):
                raise RuntimeError(f"{self.name} has no derivative in {self.takes[position]}: pass it detached")

    def backward_once(self, ctx: Any, *grads: Any) -> Any:
        """The backward; differentiated again, its result raises instead of passing for a constant."""
        assert self.backward is not None
        with torch.no_grad():
            result = self.backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return result
        message = f"{self.name} can be differentiated once; within mwpb_kernels.force_reference() more often"
        # the failing node leads to the inputs: autograd visits only what lies on the way to what it is asked for
        sources = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
        fail = torch._C._functions.DelayedError(message, 1 + len(sources))
        result = result if isinstance(result, tuple) else (result,)
        return tuple(t if t is None else fail(t, *sources)[0] for t in result)

    def on_any(self, *args: Any) -> Any:
        """The reference, where the dispatcher finds nothing faster; said once where there could be something."""
        if unsaid:
            _say_slow(args)
        return self.reference(*args)

    def on_cuda(self, *args: Any) -> Any:
        """Triton, but for float64: that is the oracle's type and stays with the reference."""
        assert self.triton is not None
        if has_float64(args):
            return self.reference(*args)
        if triton_problem():
            return self.on_any(*args)
        first = next(tensors_in(args), None)
        # Triton launches on the current device
        with contextlib.nullcontext() if first is None else torch.cuda.device_of(first):
            return self.triton(*args)


def has_float64(args: tuple[Any, ...]) -> bool:
    """Whether a tensor among the arguments, or in a list among them, holds float64."""
    return any(t.dtype == torch.float64 for t in tensors_in(args))


def tensors_in(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments, and in lists among them."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from tensors_in(a)


@contextlib.contextmanager
def force_reference(enabled: bool = True) -> Iterator[None]:
    """Run every op of this package as its plain PyTorch reference inside the block (for debugging)."""
    global _forced_reference
    before, _forced_reference = _forced_reference, enabled
    try:
        yield
    finally:
        _forced_reference = before


def _say_slow(args: tuple[Any, ...]) -> None:
    """One line on stderr (logger mwpb_kernels) for the first op on a kind of device that is slow without need."""
    first = next(tensors_in(args), None)
    kind = "cpu" if first is None else first.device.type
    cause = unsaid.pop(kind, "")
    if cause and not _forced_reference and os.environ.get("MWPB_QUIET", "0") in ("", "0"):
        logging.getLogger("mwpb_kernels").warning(
            f"mwpb_kernels: {kind.upper()} ops use the slower reference: {cause} "
            "(`mwpb-fast doctor` says what to do; MWPB_QUIET=1 hides this line)"
        )


def implementation(name: str, device: torch.device | str = "cpu") -> str:
    """Which implementation of op `name` runs on `device`: 'reference', 'native' or 'triton'.

    Raises KeyError for an unknown op.
    """
    if name not in OPS:
        raise KeyError(f"no op {name!r}; the ops are {', '.join(sorted(OPS))}")
    device = torch.device(device)
    if _forced_reference:
        return "reference"
    if device.type == "cuda" and OPS[name].triton is not None and not triton_problem():
        return "triton"
    if device.type == "cpu" and torch._C._dispatch_has_kernel_for_dispatch_key(f"mwpb::{name}", "CPU"):
        return "native"
    return "reference"


def triton_problem() -> str:
    """Why Triton is of no use, in one line, or an empty text. Imports it, if nothing has yet."""
    if late.asleep and late.wake():
        unsaid["cuda"] = late.problem
    return late.problem


def in_layout_of(x: Tensor, values: Tensor) -> Tensor:
    """A copy of `values` with the strides and type of a new tensor like x; as they are within a transform."""
    return values.to(x.dtype) if transformed() else torch.empty_like(x).copy_(values)


def writes_in_place(*operands: Any) -> None:
    """The fake of an op that writes into its operands: nothing new."""


def check_logits(logits: Tensor, *labels: Tensor) -> None:
    """Refuse what the logit ops, with labels or without, cannot take, from metadata alone (no synchronisation)."""
    check_tensors(logits=logits)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (B, C) with C >= 2, not {tuple(logits.shape)}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, not {logits.dtype}")
    for y in labels:
        check_tensors(labels=y)
        if y.shape != logits.shape[:1]:
            raise ValueError(f"labels must be ({logits.shape[0]},), not {tuple(y.shape)}")
        if y.dtype != torch.int64:
            raise TypeError(f"labels must be int64, not {y.dtype}")
        check_device(logits, y)


def check_tensors(**named: Any) -> None:
    """Refuse what is no dense tensor."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be dense, not {value.layout}")


def check_device(first: Tensor, *others: Tensor) -> None:
    """Refuse tensors on different devices."""
    for other in others:
        if other.device != first.device:
            raise ValueError(f"tensors on different devices: {first.device} and {other.device}")


def number(value: float | Tensor, name: str) -> float:
    """A scalar argument as float: any real number (int, float, Fraction, NumPy's), or a 0-d tensor on the CPU."""
    if isinstance(value, Tensor):
        if value.dim() or value.device.type != "cpu" or value.dtype == torch.bool or value.is_complex():
            kind = f"a {value.dtype} tensor {tuple(value.shape)} on {value.device}"
            raise TypeError(f"{name} must be a number or a 0-d real tensor on the CPU, not {kind}")
        if value.requires_grad or (transformed() and carries_derivative(value)):
            raise TypeError(f"{name} gets no gradient: pass it detached")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, float | int | numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    return float(value)


def whole(value: int, name: str) -> int:
    """An integer argument as int: Python's, NumPy's or whatever else can be an index."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which an op computes on `dtype`: float64 for float64, float32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
