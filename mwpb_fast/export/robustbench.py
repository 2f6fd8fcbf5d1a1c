"""The form that RobustBench's own classes load strictly: their names, and the statistics of images."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from mwpb_fast.config import ConfigError
from mwpb_fast.export.source import Source
from mwpb_fast.models import Counterpart, available, parse_name

IMAGES = (3, 32, 32)  # their classes pool over maps of the size that such images have at the end


def counterpart(source: Source) -> Counterpart:
    """RobustBench's class for the source's model, which the model's file names. Raises ConfigError."""
    file, numbers = parse_name(source.config.model.name)
    own = getattr(importlib.import_module(file), "robustbench", None)
    if own is None:
        having = [n for n in available() if hasattr(importlib.import_module(parse_name(n)[0]), "robustbench")]
        raise ConfigError(
            f"RobustBench has no class for {source.config.model.name}; it has some for {', '.join(having)}"
        )
    if (shape := (source.channels, *source.size)) != IMAGES:
        raise ConfigError(f"RobustBench's classes take images of {_times(IMAGES)}, not of {_times(shape)}")
    found: Counterpart = own(*numbers)
    return found


def field_state(source: Source) -> dict[str, Tensor]:
    """The state dict. A class that always normalises gets 0 and 1 for a model that does not; one that never does
    gets `mu` and `sigma` for a model that does, as those of RobustBench's own subclasses have them."""
    found = counterpart(source)
    state = {name: value.contiguous() for name, value in source.model.state_dict().items()}
    names, shape = (found.statistics, (-1, 1, 1)) if found.statistics else (("mu", "sigma"), (1, -1, 1, 1))
    if source.normalize is None and not found.statistics:
        return state
    values = source.normalize or ([0.0] * source.channels, [1.0] * source.channels)
    return state | {name: torch.tensor(v).view(shape) for name, v in zip(names, values, strict=True)}


def how_to_load(source: Source) -> str:
    """Python for its users: class, arguments, and what becomes of normalisation."""
    found = counterpart(source)
    arguments = found.arguments.format(num_classes=len(source.classes))
    lines = ["import torch", f"from robustbench.model_zoo.architectures import {found.module}", ""]
    made = f"{found.module}.{found.name}({arguments})"
    if source.normalize is None or found.statistics:
        return "\n".join([*lines, f"model = {made}", _STRICT])
    lines += [
        "",
        f"class Normalised({found.module}.{found.name}):",
        "    def __init__(self):",
        f"        super().__init__({arguments})",
        '        self.register_buffer("mu", torch.zeros(1, 3, 1, 1))',
        '        self.register_buffer("sigma", torch.ones(1, 3, 1, 1))',
        "",
        "    def forward(self, x):",
        "        return super().forward((x - self.mu) / self.sigma)",
        "",
        "",
        "model = Normalised()",
        _STRICT,
    ]
    return "\n".join(lines)


_STRICT = 'model.load_state_dict(torch.load("{file}", weights_only=True), strict=True)\nmodel.eval()'


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
