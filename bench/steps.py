"""The forms of the training step that benchmarks compare, and random batches for them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mwpb_kernels as ops
import torch
from ceilings import refuse_emulated
from measure import SkippedError
from torch import Tensor, nn

from mwpb_fast.capture import CapturedStep
from mwpb_fast.config import Config
from mwpb_fast.engine.build import NETS, OF_TRITON
from mwpb_fast.engine.fused_pass import FusedPass
from mwpb_fast.engine.layers import EPILOGUE, FUSED, FoldedConv
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Batch, Method
from mwpb_fast.models import build_model
from mwpb_fast.optim import make_optimizer
from mwpb_fast.step import Step


@dataclass(frozen=True)
class Variant:
    """dtype: of training, and of the attack on the twin without an attack_dtype. layers: the implementation of
    every layer of the twin that has it, "" for plain ones or what is tuned. deterministic: cuDNN's deterministic
    algorithms alone. oracle: as in PrecisionConfig. net: the name, in the trainer's `NETS`, of what the attack
    runs on where it is neither the model itself nor the plain twin. fused: whether the training pass is
    the trainer's `fused` one."""

    dtype: torch.dtype
    layout: torch.memory_format = torch.channels_last
    twin: bool = False
    attack_dtype: torch.dtype | None = None
    compiled: bool = False
    captured: bool = False
    layers: str = ""
    deterministic: bool = False
    oracle: bool = False
    net: str = ""
    fused: bool = False

    def precision(self, device: torch.device) -> Precision:
        return Precision(device, self.dtype, self.layout, oracle=self.oracle)

    def refuse_emulated(self, device: torch.device) -> None:
        """Raises SkippedError where the processor emulates a type of it."""
        for dtype in (self.dtype, self.attack_dtype or self.dtype):
            refuse_emulated(dtype, device)


FUSED_PASS = "with a fused training pass"
ORACLE = Variant(torch.float32, torch.contiguous_format, oracle=True)


def variants(low: torch.dtype) -> dict[str, Variant]:
    """By name, in the order in which they are timed."""
    name = str(low).removeprefix("torch.")
    return {
        "eager float32": Variant(torch.float32, torch.contiguous_format),
        f"eager {name} channels-last": Variant(low),
        f"eager {name} captured": Variant(low, captured=True),
        f"twin {name}": Variant(low, twin=True),
        f"twin {name} captured": Variant(low, twin=True, captured=True),
        f"twin {name} captured {EPILOGUE}": Variant(low, twin=True, captured=True, layers=EPILOGUE),
        f"twin {name} captured {FUSED}": Variant(low, twin=True, captured=True, layers=FUSED),
        f"by_hand {name} captured": Variant(low, net="by_hand", captured=True),
        f"halves {name} captured": Variant(low, net="halves", captured=True),
        f"twin {name} captured deterministic": Variant(low, twin=True, captured=True, deterministic=True),
        "twin fp32": Variant(torch.float32, twin=True),
        f"twin fp32 {FUSED_PASS}": Variant(torch.float32, twin=True, fused=True),
        f"twin {name} {FUSED_PASS}": Variant(low, twin=True, fused=True),
        f"twin {name} captured {FUSED_PASS}": Variant(low, twin=True, captured=True, fused=True),
        **{f"{n} {name} captured": Variant(low, net=n, captured=True) for n in sorted(OF_TRITON)},
        f"twin {name} compiled": Variant(low, twin=True, compiled=True),
        f"twin {name} captured compiled": Variant(low, twin=True, compiled=True, captured=True),
    }


@dataclass(frozen=True)
class Batches:
    """Random batches on the device, by turns."""

    x: list[Tensor]
    y: list[Tensor]
    index: Tensor
    key: Tensor

    @staticmethod
    def random(o: argparse.Namespace) -> Batches:
        size = (o.batch, 3, o.size, o.size)
        x = [torch.rand(size, device=o.device) for _ in range(4)]
        y = [torch.randint(10, (o.batch,), device=o.device) for _ in range(4)]
        key = torch.tensor([ops.derive_seed(0, 1)], device=o.device)
        return Batches(x, y, torch.arange(o.batch, device=o.device), key)


@dataclass(frozen=True)
class Run:
    """A step over batches by turns: run(number) is its loss on the batch of that number."""

    step: Any
    images: list[Tensor]
    batches: Batches
    method: Method
    deterministic: bool

    def __call__(self, number: int) -> Tensor:
        with deterministic(self.deterministic):
            return self.step(*self._arguments(number)).loss

    def verify(self) -> list[str] | None:
        """What of a captured step's results and state differs from the eager one's by a bit; None for others."""
        if not isinstance(self.step, CapturedStep):
            return None
        with deterministic(self.deterministic):
            return self.step.verify(*self._arguments(0))

    def _arguments(self, number: int) -> tuple[Batch, Tensor, Method]:
        turn = number % len(self.images)
        batch = Batch(self.images[turn], self.batches.y[turn], self.batches.index)
        return batch, self.batches.key, self.method


@contextlib.contextmanager
def deterministic(switch: bool) -> Iterator[None]:
    """Whether cuDNN is held to its deterministic algorithms inside the block."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, switch
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def make_model(variant: Variant, name: str, sample: Tensor, *, classes: int = 10, seed: int = 0) -> nn.Module:
    """A model with random weights for images like the sample, on its device."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes=classes, channels=sample.shape[1])
    return model.to(device=sample.device, memory_format=variant.layout)  # type: ignore[call-overload]


def make_step(
    variant: Variant, config: Config, model: nn.Module, sample: Tensor, choices: dict[str, Any] | None = None
) -> Any:
    """step(batch, key, method) over the model and an optimiser of its own, for images like the sample.

    choices: where to keep, by recipe, what the twin's layers are tuned to; None to leave them untuned.
    """
    if variant.captured and sample.device.type != "cuda":
        raise SkippedError("CUDA graphs need a CUDA device")
    precision = variant.precision(sample.device)
    net: Any
    if variant.net:
        attacked = dataclasses.replace(precision, dtype=variant.attack_dtype or precision.dtype)
        net = NETS[variant.net](model, attacked, sample)
    elif variant.twin:
        net = TwinNet(model, precision, sample, variant.attack_dtype)
        if choices is not None:
            key = config.recipe + ", captured" * variant.captured
            choices[key] = tune(net, sample, captured=variant.captured)
        take_everywhere(net, variant.layers)
    else:
        net = EagerNet(model, precision)
    step = Step(
        model=torch.compile(model, backend=counted) if variant.compiled else model,  # type: ignore[arg-type]
        net=net,
        optimizer=make_optimizer(model, config.optim),
        precision=precision,
        attack_mode=config.attack_mode,
        trained=FusedPass(model, sample) if variant.fused else None,
    )
    return CapturedStep(step) if variant.captured else step


def take_everywhere(net: TwinNet, implementation: str) -> None:
    """That implementation for all layers that can have it: on CUDA both fuse a bias and a ReLU."""
    for layer in net.layers if implementation else ():
        if isinstance(layer, FoldedConv) and layer.relu and layer.bias is not None:
            layer.implementation = implementation


class CompiledCode:
    """calls: how often code that torch.compile has made was run."""

    calls = 0


def counted(graph: Any, inputs: Any) -> Callable[..., Any]:
    """torch.compile's own backend; the runs of what it has compiled are counted."""
    from torch._inductor.compile_fx import compile_fx

    run: Any = compile_fx(graph, inputs)

    def call(*arguments: Any) -> Any:
        CompiledCode.calls += 1
        return run(*arguments)

    return call


def build(variant: Variant, config: Config, batches: Batches, o: argparse.Namespace) -> Run:
    """The step over the given batches by turns."""
    variant.refuse_emulated(o.device)
    images = [x.contiguous(memory_format=variant.layout) for x in batches.x]
    model = make_model(variant, o.model or config.model.name, images[0])
    choices = o.choices if o.tune and not variant.layers else None
    with deterministic(variant.deterministic):
        step = make_step(variant, config, model, images[0], choices)
    return Run(step, images, batches, Method.build(config), variant.deterministic)


def warm_up(config: Config, o: argparse.Namespace) -> None:
    """A step of a tiny model, so that the first variant's memory is not that of libraries being loaded."""
    tiny = argparse.Namespace(**vars(o) | {"model": "smallresnet-16", "batch": 2, "size": 8, "tune": False})
    build(Variant(torch.float32, torch.contiguous_format), config, Batches.random(tiny), tiny)(0)
