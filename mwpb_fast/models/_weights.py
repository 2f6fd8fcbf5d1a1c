"""Weights from the field's files, whatever they are wrapped in, into a model: all of them, or none and a reason.

A file is a dictionary, with others in it. A set of weights is a dictionary that holds tensors; its names are the
model's with a prefix, which nothing needs to be known of: it is what stands before all of the model's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwpb_fast.models._options import add_options
from mwpb_fast.models._statistics import find_statistics, is_statistic

if TYPE_CHECKING:
    from torch import Tensor, nn

DEPTH = 5  # dictionaries within each other
COMPILED = "_orig_mod."  # torch.compile's, before any module's own name
# what no forward pass of the model reads: an average's count, a profiler's, TRADES' unused block
HARMLESS = re.compile(r"(.*\.)?(n_averaged|total_ops|total_params|sub_block1\..*)")
LOSSES = re.compile(
    r"(criterion|loss|loss_fn|loss_function)\..*"
)  # of a module that holds the model beside a loss


@dataclass(frozen=True)
class Loaded:
    """What was taken from a file. place: dictionary and prefix. left_out: names that no forward pass needs.
    normalize: mean and standard deviation of each channel, where the file has them: the model now applies them.
    doubt: why images may have to be normalised otherwise."""

    place: str
    left_out: tuple[str, ...]
    normalize: tuple[list[float], list[float]] | None
    doubt: str = ""

    def __str__(self) -> str:
        text = f"weights from {self.place}" if self.place else "weights"
        if self.normalize:
            mean, std = (", ".join(f"{value:.4g}" for value in values) for values in self.normalize)
            text += f", images normalised by the file's own mean {mean} and deviation {std}"
        return text + (f", left out {_some(self.left_out)}" if self.left_out else "")


@dataclass(frozen=True)
class _Found:
    """A set of weights. path: of its dictionary in the file. names: cleaned name -> the file's. prefix: before the
    model's names. count: how many of these there are."""

    path: tuple[str, ...]
    content: Mapping[str, Any]
    names: dict[str, str]
    prefix: str
    count: int

    @property
    def place(self) -> str:
        return ".".join((*self.path, self.prefix.removesuffix("."))).strip(".")

    def get(self, name: str) -> Any:
        return self.content[self.names[self.prefix + name]]


def load_weights(
    model: nn.Module, content: Mapping[str, Any], choice: str = "", *, normalize: bool = True
) -> Loaded:
    """Load the weights in a file's content strictly; what the model's names are wrapped in does not matter.

    choice: where several sets of weights are in it, which: the beginning of its place, such as state_dict_ema or
    module.teacher; what stands beside it is then left out. Mean and deviation of images, as modules for
    normalisation keep them, become the model's; so do those among the file's options that can mean nothing else.
    normalize False: the model's code is to normalise images itself, and what the file has for it is a doubt.
    BN's `num_batches_tracked` may be absent, as in old files. Raises a one-line ValueError for weights that differ
    and are not chosen from, for normalisation that cannot be applied, and with the first missing, unexpected and
    wrongly shaped names; and then leaves the model as it was.
    """
    own: dict[str, Tensor] = model.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    everything = [found for path, inner in _dictionaries(content) for found in _sets(path, inner, own)]
    sets = [f for f in everything if not choice or f"{f.place}.".startswith(f"{choice.removesuffix('.')}.")]
    if choice and not sets:
        most = max((found.count for found in everything), default=0)
        places = [found.place or "the outermost" for found in everything if found.count == most]
        raise ValueError(f"no weights at {choice!r}; there are some at {_some(places)}")
    whole = [found for found in sets if found.count == len(needed)]
    chosen = _the_one(whole, needed) if whole else max(sets, key=lambda found: found.count, default=None)
    if chosen is None:
        path, most_like = max(_dictionaries(content), key=lambda item: _tensors(item[1]))
        chosen = _Found(path, most_like, {str(name): str(name) for name in most_like}, "", 0)
    weights, unexpected, left_out = _sort(chosen, whole, own, bool(choice))
    statistics = find_statistics(model, content, chosen.path, [f.prefix for f in whole if f.path == chosen.path])
    doubt = add_options(statistics, model, content) if normalize else statistics.left_out()
    _refuse(weights, unexpected, own, needed)
    applied = statistics.apply(model) if normalize else None
    model.load_state_dict(weights)
    return Loaded(chosen.place, tuple(left_out), applied, doubt)


def _dictionaries(
    content: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    yield path, content
    for key, value in content.items():
        if isinstance(value, Mapping) and len(path) < DEPTH:
            yield from _dictionaries(value, (*path, str(key)))


def _tensors(content: Mapping[Any, Any]) -> int:
    import torch

    return sum(isinstance(value, torch.Tensor) for value in content.values())


def _sets(path: tuple[str, ...], content: Mapping[Any, Any], own: Mapping[str, Any]) -> Iterator[_Found]:
    """What of a dictionary ends in the model's names, by what stands before them."""
    names: dict[str, str] = {}
    for name in content:
        if isinstance(name, str):
            clean = name if name in own else name.replace(COMPILED, "")
            if clean in names:
                raise ValueError(f"weights do not fit the model: {clean} occurs twice, compiled and not")
            names[clean] = name
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if (rest := ".".join(parts[i:])) in own:
                prefix = "".join(f"{part}." for part in parts[:i])
                counts[prefix] = counts.get(prefix, 0) + (not rest.endswith("num_batches_tracked"))
    for prefix, count in counts.items():
        yield _Found(path, content, names, prefix, count)


def _the_one(whole: list[_Found], needed: Sequence[str]) -> _Found:
    """The set of weights that is meant. Raises ValueError where several differ."""
    import torch

    # an average keeps what it is made from beside it, under a name that says so
    meant = [found for found in whole if "unaveraged_" not in found.place] or whole
    for other in meant[1:]:
        for name in needed:
            one, two = meant[0].get(name), other.get(name)
            if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and torch.equal(one, two)):
                places = ", ".join(found.place or "the outermost" for found in meant)
                raise ValueError(
                    f"there are several sets of weights, and they differ: {places}; choose by --weights "
                    "PLACE, for a model in code by --weights FILE:PLACE"
                )
    return meant[0]


def _sort(
    chosen: _Found, whole: list[_Found], own: Mapping[str, Tensor], asked: bool
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The weights by the model's names; the file's names of what should not be there, and of what may."""
    import torch

    weights: dict[str, Any] = {}
    unexpected, left_out = [], []
    prefixes = [found.prefix for found in whole if found.path == chosen.path] or [chosen.prefix]
    modules = {name.partition(".")[0] for name in own}
    for name, original in chosen.names.items():
        key, outside = name.removeprefix(chosen.prefix), not name.startswith(chosen.prefix)
        if not outside and key in own:
            weights[key] = chosen.content[original]
        elif any(name.startswith(p) and name.removeprefix(p) in own for p in prefixes):
            continue  # the same weights once more
        elif is_statistic(name, prefixes):
            continue
        elif HARMLESS.fullmatch(name) or (outside and (asked or LOSSES.fullmatch(name))):
            left_out.append(original)
        elif not isinstance(value := chosen.content.get(original), torch.Tensor):
            raise ValueError(
                f"weights do not fit the model: {original} holds {type(value).__name__}, not a tensor"
            )
        elif name.partition(".")[0] not in modules and (
            twin := next(filter(own.__contains__, _endings(name)), "")
        ):
            raise ValueError(f"weights do not fit the model: {twin} occurs twice, with and without a prefix")
        else:
            unexpected.append(original)
    return weights, unexpected, left_out


def _endings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _refuse(
    weights: Mapping[str, Any], unexpected: Sequence[str], own: Mapping[str, Tensor], needed: Sequence[str]
) -> None:
    import torch

    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"weights do not fit the model: {name} holds {type(value).__name__}, not a tensor")
    missing = [name for name in needed if name not in weights]
    shapes = [
        f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}"
        for name, value in weights.items()
        if value.shape != own[name].shape
    ]
    kinds = [
        f"{name} {value.dtype} for {own[name].dtype}"
        for name, value in weights.items()
        if own[name].is_floating_point() and not value.is_floating_point()
    ]
    kinds += [
        f"{name} {'without numbers' if value.is_meta else value.layout}"
        for name, value in weights.items()
        if value.is_meta or str(value.layout) != "torch.strided"
    ]
    titled = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes, "wrong type": kinds}
    if problems := [f"{title} {_some(names)}" for title, names in titled.items() if names]:
        raise ValueError("weights do not fit the model: " + "; ".join(problems))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
