"""Models by name, and weights from the field's files.

The file name is the registry: `resnet-18` is `build(18, ...)` of resnet.py, `wrn-34-10` is `build(34, 10,
...)` of wrn.py, and `package.module-2` is `build(2, ...)` of code outside. Importing this package does not
import torch, so that a misspelt name is refused at once.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pickle
import pkgutil
import re
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Statistics = tuple[Sequence[float], Sequence[float]]
"""(mean, std), one number a channel each."""

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "model.")
STATISTICS = {"mean": ("mean", 0.0), "mu": ("mean", 0.0), "std": ("std", 1.0), "sigma": ("std", 1.0)}


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
        raise ValueError(f"unknown model {name!r}; available: {', '.join(available())} (such as wrn-34-10)")
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
        _set_normalize(model, name, channels, *normalize)
    return model


def _set_normalize(
    model: nn.Module, name: str, channels: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    from mwpb_fast.models._layers import Normalize

    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"normalize needs {channels} means and deviations, not {len(mean)} and {len(std)}")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"normalize needs finite means and positive deviations, not {mean} and {std}")
    if not hasattr(model, "normalize"):
        raise ValueError(f"model {name!r} has no `normalize` layer to set")
    model.normalize = Normalize(mean, std)


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: safetensors by suffix, else a torch file of tensors and containers.

    Code in a pickle is never run. Raises ValueError, in one line that names the file, when it is missing,
    damaged, not a dictionary, or holds anything else than tensors and plain containers.
    """
    import torch
    from safetensors.torch import load_file

    file = fspath(path)
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {file}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # torch's own message advises how to load the file unsafely; that advice is not passed on.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it refers to {found[1]}" if found else "it is damaged or no checkpoint"
        message = f"refused checkpoint {file}: {reason}; only tensors and plain containers are loaded"
        raise ValueError(message) from error
    except Exception as error:
        # Damaged bytes make the parsers raise almost anything: IndexError, struct.error, AssertionError, ...
        raise ValueError(f"damaged checkpoint {file}: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {file} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def load_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict strictly, after undoing the variations of the field's files.

    Undone: a wrapping dictionary (`state_dict`, `model_state_dict`, `model`, `net`), the prefixes `module.`
    and `model.`, TRADES' unused `sub_block1`, and normalisation buffers (`mean`, `std`, `mu`, `sigma`),
    which are dropped, with a warning where they differ from the model's own normalisation. BN's
    `num_batches_tracked` may be absent, as in old files. Raises a one-line ValueError with the first
    missing, unexpected and wrongly shaped names, and then leaves the model as it was.
    """
    import torch

    own = model.state_dict()
    weights: dict[str, Tensor] = {}
    for original, value in _unwrap(state_dict).items():
        key = _strip(original, own)
        if key not in own and key.startswith("sub_block1."):
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"weights do not fit the model: {original} holds {type(value).__name__}, not a tensor"
            )
        if key not in own and key.rpartition(".")[2] in STATISTICS:
            _compare_statistic(model, key, value)
            continue
        if key in weights:
            raise ValueError(f"weights do not fit the model: {key} occurs twice, with and without a prefix")
        weights[key] = value
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in own]
    shapes = [
        f"{k} {tuple(weights[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    problems = [
        f"{title} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise ValueError("weights do not fit the model: " + "; ".join(problems))
    model.load_state_dict(weights)


def _unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    for wrapper in WRAPPERS:
        if isinstance(inner := state_dict.get(wrapper), Mapping):
            return _unwrap(inner)
    return state_dict


def _strip(key: str, own: Mapping[str, Any]) -> str:
    while key not in own:
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        if prefix is None:
            break
        key = key.removeprefix(prefix)
    return key


def _compare_statistic(model: nn.Module, key: str, value: Tensor) -> None:
    import torch

    attribute, neutral = STATISTICS[key.rpartition(".")[2]]
    theirs = value.detach().flatten().float().cpu()
    ours = getattr(getattr(model, "normalize", None), attribute, None)
    ours = torch.full_like(theirs, neutral) if ours is None else ours.flatten().float().cpu()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3):
        warnings.warn(
            f"the weights come with normalisation {key}={theirs.tolist()}, the model has {ours.tolist()}",
            stacklevel=3,
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
