"""What a configuration asks of the engine: the model, the net that attacks run on, the compiled training pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mwpb_kernels as ops
import torch

from mwpb_fast.config import Config, ConfigError
from mwpb_fast.engine.fused_pass import FusedPass
from mwpb_fast.engine.halves import HalvesNet
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.trial import try_model
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import BY_HAND, PLAIN, VARIANTS, TwinNet, make_net
from mwpb_fast.method import Method, Net
from mwpb_fast.models import build_model
from mwpb_fast.system import ranks


def make_model(
    name: str, classes: int, normalize: Any, sample: torch.Tensor, smallest: int, precision: Precision
) -> torch.nn.Module:
    """The model of that name, in the layout and on the device that it is to be trained on, and tried there.

    normalize: mean and standard deviation of each channel, or None. sample: (B, C, H, W) float32 images on the
    device. smallest: how many images the smallest batch has. Raises ConfigError, one line, where there is no such
    model, or one that cannot be trained.
    """
    try:
        model = build_model(name, num_classes=classes, channels=sample.shape[1], normalize=normalize)
    except (ValueError, TypeError, AttributeError, ImportError, LookupError) as error:  # of the user's own code
        raise ConfigError(f"model.name: {name}: {error}") from error
    model = model.to(device=precision.device, memory_format=precision.memory_format)  # type: ignore[call-overload]
    try_model(model, name, sample, classes, smallest, precision)
    return model


def make_method(config: Config) -> Method:
    """The method of a configuration. Raises ConfigError where a module of the user's lacks something."""
    try:
        return Method.build(config)
    except TypeError as error:
        raise ConfigError(str(error)) from error


def make_engine(
    model: torch.nn.Module, config: Config, precision: Precision, sample: torch.Tensor
) -> tuple[Net, list[dict[str, Any]]]:
    """The net that attacks run on where nothing is tried, and what was chosen for its layers by measurement, as
    `tune` records it.

    precision: the attack's. sample: (B, C, H, W) float32 images on the model's device, as many as a batch has.
    Raises ConfigError where what is named cannot run on that device.
    """
    name = by_rule(config, precision)
    if reason := lacking(name, precision.device):
        raise ConfigError(f"precision.engine: {reason}")
    if name == "eager":
        return EagerNet(model, precision), []
    with precision.mode():  # so that what is measured is what will run
        net = _parted(name, make_net(model, precision, sample, variant=TWINS[name]), precision.device)
        # with auto the layers are measured once it is known what is taken
        if not (config.precision.tune and config.precision.engine != "auto" and isinstance(net, TwinNet)):
            return net, []
        return net, tune(net, sample, captured=config.precision.capture is True)


def by_rule(config: Config, precision: Precision) -> str:
    """The name in `NETS` of what is asked for, and for auto of what needs no trial. precision: the attack's."""
    if config.precision.engine != "auto":
        return config.precision.engine
    # where the equivalence ledger (docs/performance.md) holds it to the model itself, and it can be folded
    in_bounds = precision.device.type == "cpu" and precision.dtype == torch.float32
    return "twin" if in_bounds and config.attack_mode == "eval" else "eager"


def lacking(name: str, device: torch.device) -> str:
    """Why the net of that name in `NETS` is of no use on a device; "" where it is."""
    if name == HALVES and device.type != "cuda":
        return f"{name} runs on two CUDA streams; take by_hand"
    if name not in OF_TRITON or ops.implementation("conv_relu", device.type) == "triton":
        return ""
    why = f", and {ops.triton_problem}" if device.type == "cuda" and ops.triton_problem else ""
    return f"{name} is made of Triton kernels, which serve CUDA alone{why}; take twin or by_hand"


def _twin(name: str) -> Callable[[torch.nn.Module, Precision, torch.Tensor], Net]:
    def make(model: torch.nn.Module, precision: Precision, sample: torch.Tensor) -> Net:
        if reason := lacking(name, precision.device):
            raise ConfigError(reason)
        return _parted(name, TwinNet(model, precision, sample, variant=TWINS[name]), precision.device)

    return make


def _parted(name: str, net: Net, device: torch.device) -> Net:
    """In two halves where the name says so; what cannot be folded has been told of, and is left whole."""
    return HalvesNet(net, device) if name == HALVES and isinstance(net, TwinNet) else net


HALVES = "halves"
# variants of the twin
TWINS = {HALVES: BY_HAND} | {"twin" if variant == PLAIN else variant: variant for variant in VARIANTS}
OF_TRITON = TWINS.keys() - {"twin", BY_HAND, HALVES}
# What an attack may run on, by name, in the order in which they are preferred where none is clearly faster. Each
# is made of the model, the attack's precision and a batch of images, and raises where it cannot be.
NETS: dict[str, Callable[[torch.nn.Module, Precision, torch.Tensor], Net]] = {
    "by_hand": _twin("by_hand"),
    HALVES: _twin(HALVES),
    "twin": _twin("twin"),
    "eager": lambda model, precision, sample: EagerNet(model, precision),
    **{name: _twin(name) for name in TWINS if name in OF_TRITON},
}
# Of these, what a trial looks at. On a CPU passes over memory are not what an attack waits for. What is made of
# Triton's matrix products is had by name alone until it has run on a device: after its illegal access nothing else
# could go on in that process.
TRIED = {"cpu": ("twin", "eager"), "cuda": ("by_hand", HALVES, "twin", "eager")}
GRAPHED = (HALVES,)  # of these, in a graph alone: launched one by one it takes longer than the whole


def build_net(
    name: str, model: torch.nn.Module, precision: Precision, sample: torch.Tensor, tuned: bool, captured: bool
) -> tuple[Net, list[dict[str, Any]]]:
    """The net of that name in `NETS`, and what was chosen for its layers where it is to be `tuned`, for a step
    that will be `captured` or not. Raises where it cannot be built, or its kernels do not compile."""
    net = NETS[name](model, precision, sample)
    return net, tune(net, sample, captured=captured) if tuned and isinstance(net, TwinNet) else []


def compiled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """torch.compile's form of `model`, with its parameters. Raises ConfigError where nothing can be compiled."""
    try:  # something small: a model takes long
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler that is missing or fails may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"precision.compile: torch.compile does not work here: {reason}") from error
    result: Any = torch.compile(model)
    return result


PLAIN_PASS = "plain"
# What the training pass may run on, by name: made of the model and of a batch of images, or an error.
# It shares the model's parameters and buffers.
TRAININGS: dict[str, Callable[[torch.nn.Module, torch.Tensor], torch.nn.Module]] = {
    PLAIN_PASS: lambda model, sample: model,
    "fused": FusedPass,
    "compiled": lambda model, sample: compiled(model, sample.device),
}
# Of these, what a trial compares with the plain one; and what besides where layers are tuned, as compiling may
# take longer than all else. On a CPU none, until more than one short run has found a gain (docs/performance.md).
TRIED_TRAININGS: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ("fused",)}
TUNED_TRAININGS: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ("compiled",)}


def named_training(config: Config) -> str:
    """The name in `TRAININGS` that is asked for; "" where that is left to a trial. Several processes train through
    PyTorch's DistributedDataParallel, whose gradients are of the model itself."""
    asked = config.precision
    if asked.oracle or ranks.launched() > 1:
        return PLAIN_PASS
    return "compiled" if asked.compile else "" if asked.training == "auto" else asked.training
