"""The ledger's training rows: loss curves of the fast paths beside those of the oracle and its other seeds.

A curve is the loss of each of the first steps from random weights, averaged over windows of ten steps. The
distance of two curves is the mean absolute difference of these averages. A fast path is in bounds where its
distance from the oracle's curve with the same seed (same weights, batches and noise) is at most the mean
distance between the oracle's own curves with different seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
from ceilings import refuse_emulated
from measure import full_float32
from record import Results
from torch import Tensor, nn
from train import captured

from mwpb_fast.attacks import pgd
from mwpb_fast.config import OptimConfig, load
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Batch, Method
from mwpb_fast.models import build_model
from mwpb_fast.optim import make_optimizer
from mwpb_fast.step import Step

OBJECTIVES = ("at", "trades", "mart")
WINDOW = 10  # steps


@dataclass(frozen=True)
class Route:
    """twin: number type of the attack's twin, None for the model itself. dtype: of autocast in training."""

    twin: torch.dtype | None
    dtype: torch.dtype
    captured: bool = False


PATHS = {
    "twin float32": Route(torch.float32, torch.float32),
    "twin bfloat16": Route(torch.bfloat16, torch.float32),
    "autocast bfloat16": Route(None, torch.bfloat16),
    "twin and autocast bfloat16": Route(torch.bfloat16, torch.bfloat16),
    "twin and autocast bfloat16, captured": Route(torch.bfloat16, torch.bfloat16, captured=True),
}


class Parts:
    """Finished parts of a result, kept in a file beside it until the whole is written.

    settings: what the parts depend on; parts of other settings are passed over.
    """

    def __init__(self, result: Path | None, settings: dict[str, str]) -> None:
        self.path = None if result is None else result.with_name(f".{result.name}.parts.pt")
        self.content: dict[str, Any] = {"settings": settings}
        if self.path is not None and self.path.exists():
            try:
                found = torch.load(self.path, weights_only=True)
            except Exception:  # cut off while it was written
                found = {}
            if found.get("settings") == settings:
                self.content = found

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name, made where it is not there."""
        if name not in self.content:
            self.content[name] = make()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.path.with_suffix(".tmp")
                torch.save(self.content, temporary)
                temporary.replace(self.path)
        return self.content[name]

    def done(self) -> None:
        """The whole is written; the parts are not needed any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def oracle_precision(device: torch.device) -> Precision:
    return Precision(device, torch.float32, torch.contiguous_format, oracle=True)


@contextlib.contextmanager
def as_oracle(device: torch.device) -> Iterator[None]:
    """What the reference runs in: reference ops, deterministic algorithms, and float32 that is not rounded to TF32
    within. No twin can be made inside."""
    with oracle_precision(device).mode(), full_float32():
        yield


def loss_curve(
    objective: str, seed: int, path: Route | None, x: Tensor, y: Tensor, o: argparse.Namespace
) -> tuple[Tensor, nn.Module]:
    """(steps,) losses of the margin-weighted form of `objective`, and the model that it leaves; path: None for
    the oracle."""
    if path is None:
        with as_oracle(x.device):
            return _curve(objective, seed, None, oracle_precision(x.device), x, y, o)
    precision = Precision(x.device, path.dtype, torch.channels_last, oracle=False)
    with precision.mode():
        return _curve(objective, seed, path, precision, x, y, o)


def _curve(
    objective: str,
    seed: int,
    path: Route | None,
    precision: Precision,
    x: Tensor,
    y: Tensor,
    o: argparse.Namespace,
) -> tuple[Tensor, nn.Module]:
    torch.manual_seed(seed)
    layout = precision.memory_format
    model = build_model(o.train_model, num_classes=10)
    model = model.to(device=x.device, memory_format=layout)  # type: ignore[call-overload]
    net: Any = EagerNet(model, precision)
    if path is not None and path.twin is not None:
        net = TwinNet(model, precision, x[:2], path.twin)
    step: Any = Step(
        model=model,
        net=net,
        optimizer=make_optimizer(model, OptimConfig(lr=0.05)),
        precision=precision,
    )
    method = Method(
        budget=load("budgets", "margin").Config().build(),
        attack=pgd.Config(steps=o.attack_steps).build(),
        objective=load("objectives", objective).Config().build(),
        perturb=load("perturbations", "none").Config().build(),
    )
    order = torch.Generator().manual_seed(seed)
    key = torch.tensor([ops.derive_seed(seed, 1)], device=x.device)
    losses = []
    if path is not None and path.captured:
        step = captured(step)
    for _ in range(o.train_steps):
        rows = torch.randperm(len(x), generator=order)[: o.train_batch].to(x.device)
        images = x[rows].contiguous(memory_format=layout)
        losses.append(step(Batch(images, y[rows], rows), key, method).loss.clone())
    return torch.stack(losses).cpu(), model.eval()


def smoothed(curve: Tensor) -> Tensor:
    width = min(WINDOW, len(curve))
    return curve[: len(curve) // width * width].view(-1, width).mean(1)


def distance(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference of two curves of one length, each first averaged over windows of ten steps."""
    return (smoothed(a) - smoothed(b)).abs().mean().item()


def training_rows(x: Tensor, y: Tensor, o: argparse.Namespace, parts: Parts, results: Results) -> None:
    """Put a row for each objective that is unfinished and each path, and name the paths that do not run here."""

    def curve(objective: str, seed: int, name: str, path: Route | None) -> Tensor:
        return parts.get(f"{objective} {name} {seed}", lambda: loss_curve(objective, seed, path, x, y, o)[0])

    for objective in [name for name in o.objectives if name in results.unfinished]:
        rows: list[dict[str, Any]] = []
        oracle = [curve(objective, seed, "oracle", None) for seed in range(o.seeds)]
        between = [distance(a, b) for a, b in itertools.combinations(oracle, 2)]
        for name, path in PATHS.items():
            try:
                for dtype in (path.twin, path.dtype):
                    if dtype is not None:
                        refuse_emulated(dtype, x.device)
                fast = curve(objective, 0, name, path)
            except Exception as error:  # named, and the others go on
                results.skip(name, error)
                continue
            row: dict[str, Any] = {
                "kind": "training",
                "path": name,
                "objective": objective,
                "steps": o.train_steps,
                "distance": distance(fast, oracle[0]),
                "allowed": statistics.mean(between),
                "seed_distances": between,
                "last_losses": [c[-WINDOW:].mean().item() for c in (fast, *oracle)],
                "curves": {"path": fast.tolist(), "oracle": [c.tolist() for c in oracle]},
            }
            row["in_bounds"] = row["distance"] <= row["allowed"]
            rows.append(row)
            results.put(objective, rows, done=False)
            print(
                f"training {name:40s} {objective:7s} distance {row['distance']:.4f}, between seeds "
                f"{row['allowed']:.4f}, in bounds: {row['in_bounds']}",
                flush=True,
            )
        results.put(objective, rows)
