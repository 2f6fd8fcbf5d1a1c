"""What a configuration asks of the engine: the model, the net that attacks run on, the compiled training pass."""

from __future__ import annotations

from typing import Any

import torch

from mwpb_fast.config import Config, ConfigError
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.trial import try_model
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import TwinNet, make_net
from mwpb_fast.method import Method, Net
from mwpb_fast.models import build_model


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
    """The net that attacks run on, and what was chosen for its layers by measurement, as `tune` records it.

    precision: the attack's. sample: (B, C, H, W) float32 images on the model's device, as many as a batch has.
    """
    folded = config.precision.engine == "twin"
    if config.precision.engine == "auto":
        # where the equivalence ledger (docs/performance.md) holds it to the model itself, and it can be folded
        in_bounds = precision.device.type == "cpu" and precision.dtype == torch.float32
        folded = in_bounds and config.attack_mode == "eval"
    if not folded:
        return EagerNet(model, precision), []
    with precision.mode():  # so that what is measured is what will run
        net = make_net(model, precision, sample)
        if not (config.precision.tune and isinstance(net, TwinNet)):
            return net, []
        return net, tune(net, sample, captured=config.precision.capture)


def compiled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """torch.compile's form of `model`, with its parameters. Raises ConfigError where nothing can be compiled."""
    try:  # something small: a model takes long
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler that is missing or fails may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"precision.compile: torch.compile does not work here: {reason}") from error
    result: Any = torch.compile(model)
    return result
