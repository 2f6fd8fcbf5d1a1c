"""Models by name, and weights from the field's files.

The file name is the registry: `resnet-18` is `build(18, ...)` of resnet.py, `wrn-34-10` is `build(34, 10,
...)` of wrn.py, and `package.module-2` is `build(2, ...)` of code outside. Importing this package does not
import torch, so that a misspelt name is refused at once.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mwpb_fast.meant import meant
from mwpb_fast.models._counterpart import Counterpart
from mwpb_fast.models._files import read_checkpoint
from mwpb_fast.models._weights import Loaded, load_weights

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Counterpart",
    "Loaded",
    "Statistics",
    "available",
    "build_model",
    "load_weights",
    "parse_name",
    "read_checkpoint",
]

Statistics = tuple[Sequence[float], Sequence[float]]
"""(mean, std), one number a channel each."""


def available() -> list[str]:
    """The names of the architectures in this folder."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def parse_name(name: str) -> tuple[str, tuple[int, ...]]:
    """Split `"wrn-34-10"` into the module to import and `(34, 10)`, without importing anything.

    Raises ValueError for a name that is not `<file>-<int>-<int>...` or whose file is not in this folder; a
    dotted name is taken as it is.
    """
    match = re.fullmatch(r"([A-Za-z_][\w.]*)((?:-[0-9]+)*)", name)
    if match is None:
        raise ValueError(f"model name {name!r} is not of the form NAME-NUMBER, such as resnet-18, wrn-34-10")
    file, numbers = match[1], tuple(int(number) for number in match[2].split("-")[1:])
    if "." in file:
        return file, numbers
    if file not in available():
        own = re.findall(r"[0-9]+", name)
        # wrn3410 may be many models
        known = ["-".join([file, *own]) for file in available()] if max(map(len, own), default=0) < 4 else []
        listed = f"{', '.join(available())} (such as wrn-34-10)"
        raise ValueError(f"unknown model {name!r}{meant(name, known, '; available: ', listed=listed)}")
    return f"{__name__}.{file}", numbers


def build_model(
    name: str, *, num_classes: int, channels: int = 3, normalize: Statistics | None = None
) -> nn.Module:
    """Build the model `name`, freshly initialised from torch's global generator, in float32 and train mode.

    It maps images (B, channels, H, W), in [0, 1] but unchecked, to logits (B, num_classes), for any H and
    W. `normalize = (mean, std)` makes its first layer, `normalize`, compute (x - mean) / std for each
    channel; the state dict is the same with and without. Raises ValueError, in one line, for an unknown
    name, numbers that the architecture does not have, or unusable statistics.
    """
    module_name, numbers = parse_name(name)
    if num_classes < 1 or channels < 1:
        raise ValueError(f"{name} needs at least one class and one channel, not {num_classes} and {channels}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"model {name!r}: no module named {error.name!r}") from error
    build = getattr(module, "build", None)
    if build is None:
        raise ValueError(f"model {name!r}: {module_name} has no build(...) function")
    parameters = inspect.signature(build).parameters.values()
    wanted = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(numbers) != len(wanted) and not variadic:
        usage = "-".join([name.split("-")[0], *(f"<{w}>" for w in wanted)])
        raise ValueError(f"model {name!r} has the wrong count of numbers: write {usage}")
    model: nn.Module = build(*numbers, num_classes=num_classes, channels=channels)
    if normalize is not None:
        from mwpb_fast.models._layers import set_normalize

        try:
            set_normalize(model, channels, *normalize)
        except ValueError as error:
            raise ValueError(f"model {name!r}: {error}") from error
    return model
