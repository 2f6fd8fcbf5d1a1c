"""What the examples share: ways of one computation timed in turn, a check that they agree, and some digits."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor

T = TypeVar("T")
SMALL = "--small" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def beside(ways: dict[str, Callable[[], T]], rounds: int = 10) -> list[T]:
    """Call each once, then so many times in turn, every other round backwards, and print the median times. A ratio
    is the median of those to the first way's time in the same round: what slows a round slows both. Returns what
    the first calls gave."""
    results = [call() for call in ways.values()]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(2 if SMALL else rounds):
        for name in reversed(ways) if turn % 2 else ways:
            _finish()
            began = time.perf_counter()
            ways[name]()
            _finish()
            taken[name].append(time.perf_counter() - began)
    plain, *_ = taken.values()
    for name, times in taken.items():
        ratio = statistics.median(p / t for p, t in zip(plain, times, strict=True))
        print(f"{name:16s}{1e3 * statistics.median(times):10.2f} ms, {ratio:.2f} times as fast")
    return results


def same(plain: Tensor, other: Tensor, within: float, share: float = 1.0) -> None:
    """Raise unless that share of the numbers agree. Where a gradient is nearly 0, its sign depends on the order of
    a sum, so of images and of what was trained on them rarely all do."""
    agree = ((plain - other).abs() <= within).double().mean().item()
    print(f"the same result: {100 * agree:.2f} % of the numbers agree to within {within:g}")
    if not agree >= share:
        raise AssertionError(f"{100 * agree:.2f} % of the numbers agree, not {100 * share:g} %")


def digits(count: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's: images (N, 1, 8, 8) in [0, 1], and labels."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return x[:count].to(DEVICE), torch.tensor(labels)[:count].to(DEVICE)


def _finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
