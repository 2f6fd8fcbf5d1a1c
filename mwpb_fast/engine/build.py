"""What a configuration asks of the engine: the net that attacks run on, and the compiled training pass."""

from __future__ import annotations

from typing import Any

import torch

from mwpb_fast.config import Config, ConfigError
from mwpb_fast.engine.net import EagerNet, Net
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import TwinNet, make_net


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
        return net, tune(net, sample) if config.precision.tune and isinstance(net, TwinNet) else []


def compiled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """torch.compile's form of `model`, with its parameters. Raises ConfigError where nothing can be compiled."""
    try:  # something small: a model takes long
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler that is missing or fails may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"precision.compile: torch.compile does not work here: {reason}") from error
    result: Any = torch.compile(model)
    return result
