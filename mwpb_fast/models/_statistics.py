"""Mean and standard deviation of images in a file of weights: found, compared, made the model's first layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

KINDS = {"mean": "mean", "mu": "mean", "new_mean": "mean", "std": "std", "sigma": "std", "new_std": "std"}
NEUTRAL = {"mean": 0.0, "std": 1.0}
# the names of modules that normalise images; `0` only before the model in a Sequential
NORMALISERS = re.compile(r"((data|input|image)_?)?(norm|normali[sz]e|normali[sz]er|normali[sz]ation)(_?layer)?")
TOLERANCE = 1e-3


@dataclass
class Statistics:
    """What a file says: kind, mean or std, -> name -> a number for each channel."""

    channels: int
    found: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {"mean": {}, "std": {}})

    def apply(self, model: nn.Module) -> tuple[list[float], list[float]] | None:
        """Make them the model's, and return them; None where there are none, or they change nothing. Raises
        ValueError, one line, where they disagree or cannot be applied."""
        from mwpb_fast.models._layers import Normalize, set_normalize

        one = {kind: self._one(kind) for kind in NEUTRAL}
        names = ", ".join(name for values in self.found.values() for name in values)
        if not names:
            return None
        for kind, other in (("mean", "std"), ("std", "mean")):
            if one[other] is None and one[kind] != [NEUTRAL[kind]] * self.channels:
                raise ValueError(f"the file has {names} for normalisation, and no {other} that belongs to it")
        mean, std = (values or [NEUTRAL[kind]] * self.channels for kind, values in one.items())
        if not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(mean, std, strict=True)):
            raise ValueError(
                f"the file's normalisation {names} is not for images in [0, 1]: mean {mean}, std {std}"
            )
        ours = getattr(model, "normalize", None)
        if not isinstance(ours, Normalize):
            if mean == [0.0] * self.channels and std == [1.0] * self.channels:
                return None
        elif not (_close(ours.mean.flatten().tolist(), mean) and _close(ours.std.flatten().tolist(), std)):
            raise ValueError(
                f"the file's normalisation {names} is mean {_show(mean)}, std {_show(std)}, the model's mean "
                f"{_show(ours.mean.flatten().tolist())}, std {_show(ours.std.flatten().tolist())}: "
                "leave --model.normalize out, the file's is then applied"
            )
        try:
            set_normalize(model, self.channels, mean, std)
        except ValueError as error:
            raise ValueError(f"the file's normalisation {names} cannot be applied: {error}") from error
        model.normalize.to(next(model.parameters()).device)
        return mean, std

    def left_out(self) -> str:
        """What to say where they are not applied; "" where they change nothing."""
        neutral = (
            all(v == NEUTRAL[kind] for v in values) for kind in NEUTRAL for values in self.found[kind].values()
        )
        if all(neutral):
            return ""
        names = ", ".join(name for values in self.found.values() for name in values)
        return f"the file's normalisation {names} is not applied to a model in code, which has no place for it"

    def add(self, name: str, mean: list[float], std: list[float]) -> None:
        """Both of a place that is called `name`."""
        self.found["mean"][name], self.found["std"][name] = mean, std

    def has(self, mean: list[float], std: list[float]) -> bool:
        """Whether these are what was found."""
        pairs = ((values, self.found[kind].values()) for kind, values in (("mean", mean), ("std", std)))
        return all(_close(one, values) for values, all_of in pairs for one in all_of)

    def _one(self, kind: str) -> list[float] | None:
        values = list(self.found[kind].values())
        if any(not _close(values[0], other) for other in values[1:]):
            raise ValueError(f"the file's {', '.join(self.found[kind])} for normalisation disagree")
        return values[0] if values else None


def find_statistics(
    model: nn.Module, content: Mapping[Any, Any], path: Sequence[str], prefixes: Sequence[str]
) -> Statistics:
    """Of a file's content: beside the weights, which are in the dictionary at `path` under `prefixes`, and beside
    the dictionaries that they are in. Raises ValueError for those of another number of channels."""
    known = next((p.shape[1] for p in model.parameters() if p.dim() == 4), None)
    channels = known or 1
    found = Statistics(channels)
    inner, own = content, set(model.state_dict())
    for step in (*path, None):
        for name, value in _entries(inner, step):
            beside, kind = step is None, KINDS.get(name.rpartition(".")[2])
            if kind is None or not is_statistic(name, prefixes if beside else [""]):
                continue
            if beside and any(name.startswith(p) and name.removeprefix(p) in own for p in prefixes):
                continue
            numbers = numbers_of(value)
            if not beside and len(numbers) not in (1, channels):
                continue
            if known and len(numbers) not in (1, channels):
                raise ValueError(
                    f"the file's normalisation {name} has {len(numbers)} numbers for {channels} channels"
                )
            found.found[kind][name] = numbers * (channels if len(numbers) == 1 else 1)
        if step is not None:
            inner = next(value for key, value in inner.items() if str(key) == step)
    return found


def numbers_of(value: Any) -> list[float]:
    """Those of a tensor or a list; [] for anything else."""
    import torch

    if isinstance(value, torch.Tensor):
        numbers: list[float] = value.detach().double().flatten().tolist()
        return numbers
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
        return [float(v) for v in value]
    return []


def is_statistic(name: str, prefixes: Sequence[str]) -> bool:
    """Whether a name is that of images' statistics: of a module that normalises, or of one that the weights are
    in, beside or around the model whose names begin with one of `prefixes`."""
    *module, leaf = name.split(".")
    if leaf not in KINDS:
        return False
    for prefix in prefixes:
        around = prefix.split(".")[:-1]
        if module == around[: len(module)]:
            return True
        if module[:-1] == around[: len(module) - 1]:
            first = module[-1] == "0" and around[len(module) - 1 : len(module)] == ["1"]
            if first or NORMALISERS.fullmatch(module[-1]):
                return True
    return False


def _entries(content: Mapping[Any, Any], within: str | None) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = str(key).replace("_orig_mod.", "")
        if isinstance(value, Mapping) and within is not None and str(key) != within:
            yield from ((f"{name}.{inner}", v) for inner, v in value.items())
        else:
            yield name, value


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b), 1e-8) for a, b in zip(one, other, strict=True))


def _show(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
