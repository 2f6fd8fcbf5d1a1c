"""Mean and deviation of images among the options that a script saved beside its weights.

What a script calls `args` or `config` says how it was started, not what its model computes. So these statistics
are applied where they can mean one thing alone; where they may mean that images were normalised, that is a doubt.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwpb_fast.models._statistics import KINDS, Statistics, numbers_of

if TYPE_CHECKING:
    from torch import nn

DEPTH = 5  # of options within each other
OPTIONS = re.compile(
    r".*(arg|param|config|cfg|conf|opt|setting|flag|data|transform|process|augment|normali[sz]|_norm).*"
)
OF_IMAGES = r"((?:data|dataset|image|img|input|pixel|channel|norm|normali[sz]e|normali[sz]ation)_?|)"
STATISTIC = re.compile(rf"{OF_IMAGES}({'|'.join(KINDS)})")
FLAG = re.compile(r"((data|input|image|img)_?)?normali[sz](e|ed|er|ation)(_?(data|inputs?|images?))?")
OFF = re.compile(r"|no|none|false|off|.*(batch|layer|group|instance|bn|ln|gn).*")  # the latter: kinds of layers


@dataclass(frozen=True)
class _Pair:
    """A mean and a deviation, [] where there is none. bare: whether they are single numbers."""

    name: str
    mean: list[float]
    std: list[float]
    bare: bool

    def is_clear(self, channels: int) -> bool:
        """Whether it is a number for each channel, of images in [0, 1]."""
        inside = all(0 <= m <= 1 for m in self.mean) and all(0 < s <= 1 for s in self.std)
        return len(self.mean) == len(self.std) == channels and inside and not self.bare

    def is_idle(self) -> bool:
        """Whether it is no normalisation: single numbers such as a weight's at the start, or of something else."""
        if self.bare:
            return not (self.mean and self.std and 0 < self.mean[0] < 1)
        return len(self.mean or self.std) not in (1, 3) or not (any(self.mean) or set(self.std) != {1.0})


def add_options(statistics: Statistics, model: nn.Module, content: Mapping[Any, Any]) -> str:
    """Add to a file's own statistics those among its options, where these are clear and the file has none; returns
    in one line what is doubtful about them, or ""."""
    from mwpb_fast.models._layers import Normalize

    pairs, flags = [], []
    for name, options in _options(content):
        said = {key: _is_on(value) for key, value in options.items() if FLAG.fullmatch(key)}
        flags += [f"{name}.{key}" for key, on in said.items() if on]
        if not said or any(said.values()):
            pairs += [pair for pair in _pairs(name, options) if not pair.is_idle()]
    clear = [pair for pair in pairs if pair.is_clear(statistics.channels)]
    unclear = [pair.name for pair in pairs if pair not in clear]
    for pair in clear:
        if not any(statistics.found.values()) and hasattr(model, "normalize"):
            statistics.add(pair.name, pair.mean, pair.std)
        elif not any(statistics.found.values()) or not statistics.has(pair.mean, pair.std):
            unclear.append(pair.name)  # without that layer, its own code may do it already
    if not (unclear or any(statistics.found.values()) or isinstance(getattr(model, "normalize", None), Normalize)):
        unclear = flags
    if not unclear:
        return ""
    return (
        f"the file's options {', '.join(unclear[:3])} may mean images normalised otherwise than here; "
        "--model.normalize true takes mean and deviation of the training images"
    )


def _options(content: Any, path: tuple[str, ...] = (), sure: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """What in a file holds options, by its place: dictionaries by their name, namespaces, and what is in them."""
    import torch

    if isinstance(content, (argparse.Namespace, types.SimpleNamespace)):
        content, sure = vars(content), True
    elif isinstance(content, (list, tuple)) and sure:
        content = dict(enumerate(content))
    if not isinstance(content, Mapping) or len(path) > DEPTH:
        return
    named = {str(key): value for key, value in content.items()}
    if sure and not any(isinstance(v, torch.Tensor) and not STATISTIC.fullmatch(k) for k, v in named.items()):
        yield ".".join(path), named
    for key, value in named.items():
        yield from _options(value, (*path, key), sure or OPTIONS.fullmatch(key.lower()) is not None)


def _pairs(name: str, options: Mapping[str, Any]) -> Iterator[_Pair]:
    found: dict[Any, dict[str, Any]] = {}
    for key, value in options.items():
        match = STATISTIC.fullmatch(key)
        if match and (numbers := numbers_of(value) or numbers_of([value])):
            alphabet = match[2] in ("mu", "sigma")  # a sigma beside mean and std is a noise's
            found.setdefault((match[1], alphabet), {})[KINDS[match[2]]] = (key, numbers, not numbers_of(value))
    for both in found.values():
        names = ", ".join(f"{name}.{key}" for key, _, _ in both.values())
        mean, std = (both.get(kind, ("", [], True)) for kind in ("mean", "std"))
        yield _Pair(names, mean[1], std[1], mean[2] and std[2])


def _is_on(value: Any) -> bool:
    """Whether a value of an option named after normalisation says that there is some."""
    if isinstance(value, str):
        return not OFF.fullmatch(value.lower())
    return bool(value)
