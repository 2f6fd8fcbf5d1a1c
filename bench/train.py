"""The whole training step of MWPB-AT, -TRADES and -MART: this project's engines in turn in one run.

    python bench/train.py --json bench/results/train-resnet-18-cpu.json
    python bench/train.py --recipes table2.mwpb_at --batch 128 --json ...

Budget, attack, objective and optimiser are those of the named recipes, in the second phase, where the radii
follow the margins; the images are random. The variants: the model itself in float32; the same in bf16 autocast
and channels-last; with the attack on the folded twin; with training forward and backward compiled besides; and
the step captured in a CUDA graph. A round times each once, so ratios are between neighbours in time. FLOP are
those of convolutions and linear layers: two a multiply-add, a forward pass and an input gradient for each attack
step, one more forward pass where the margin or the objective asks for it, three for every training pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
from measure import (
    Memory,
    SkippedError,
    keep_freed_memory,
    matrix_rate,
    multiply_adds,
    reason,
    seconds,
    spread,
    write_results,
)
from torch import Tensor, nn

from mwpb_fast.config import Config, recipe
from mwpb_fast.engine.capture import CapturedStep
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision, cpu_has_bf16
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.models import build_model
from mwpb_fast.optim import make_optimizer
from mwpb_fast.step import Step

EPOCH = 50_000  # images
RECIPES = ("table1.mwpb_at", "table1.mwpb_trades", "table1.mwpb_mart")
COLUMNS = (
    ("recipe", "recipe", ""),
    ("variant", "step", ""),
    ("faster", "times the first's speed", ".2f"),
    ("images_per_second", "images/s", ",.1f"),
    ("epoch_seconds", "s per 50k epoch", ",.1f"),
    ("gflops", "GFLOP/s", ",.0f"),
    ("share", "share of the matrix rate", ".0%"),
    ("memory_mib", "peak MiB", ",.0f"),
    ("loss", "loss of the first step", ".4f"),
)
Run = Callable[[int], Tensor]  # from the number of a batch to the step's loss


@dataclass(frozen=True)
class Variant:
    dtype: torch.dtype
    layout: torch.memory_format
    twin: bool = False
    compiled: bool = False
    captured: bool = False


def variants(low: torch.dtype) -> dict[str, Variant]:
    plain, last = torch.contiguous_format, torch.channels_last
    name = str(low).removeprefix("torch.")
    return {
        "eager float32": Variant(torch.float32, plain),
        f"eager {name} channels-last": Variant(low, last),
        f"twin {name}": Variant(low, last, twin=True),
        f"twin {name} captured": Variant(low, last, twin=True, captured=True),
        f"twin {name} compiled": Variant(low, last, twin=True, compiled=True),
    }


@dataclass(frozen=True)
class Batches:
    """Random batches on the device, by turns."""

    x: list[Tensor]
    y: list[Tensor]
    index: Tensor
    key: Tensor

    @staticmethod
    def random(o: argparse.Namespace) -> Batches:
        size = (o.batch, 3, o.size, o.size)
        x = [torch.rand(size, device=o.device) for _ in range(4)]
        y = [torch.randint(10, (o.batch,), device=o.device) for _ in range(4)]
        key = torch.tensor([ops.derive_seed(0, 1)], device=o.device)
        return Batches(x, y, torch.arange(o.batch, device=o.device), key)


def make_step(variant: Variant, config: Config, sample: Tensor, o: argparse.Namespace) -> Any:
    """step(x, y, index, key, budget) over a model and an optimiser of its own, for images like the sample."""
    if variant.dtype == torch.bfloat16 and o.device.type == "cpu" and not cpu_has_bf16():
        raise SkippedError("this CPU has no bfloat16")
    torch.manual_seed(0)
    precision = Precision(o.device, variant.dtype, variant.layout, oracle=False)
    model = build_model(o.model or config.model.name, num_classes=o.classes, channels=sample.shape[1])
    model = model.to(device=o.device, memory_format=variant.layout)  # type: ignore[call-overload]
    net: Any = TwinNet(model, precision, sample) if variant.twin else EagerNet(model, precision)
    if variant.twin and o.tune:
        o.choices[config.recipe] = tune(net, sample)
    step = Step(
        model=torch.compile(model) if variant.compiled else model,  # type: ignore[arg-type]
        net=net,
        attack=config.attack.build(),
        objective=config.objective.build(),
        perturb=config.perturbation.build(),
        optimizer=make_optimizer(model, config.optim),
        precision=precision,
        attack_mode=config.attack_mode,
    )
    return captured(step) if variant.captured else step


def build(variant: Variant, config: Config, batches: Batches, o: argparse.Namespace) -> Run:
    """The step over the given batches by turns."""
    images = [x.contiguous(memory_format=variant.layout) for x in batches.x]
    step, budget = make_step(variant, config, images[0], o), config.budget.build()

    def run(number: int) -> Tensor:
        turn = number % len(images)
        return step(images[turn], batches.y[turn], batches.index, batches.key, budget).loss

    return run


def captured(step: Step) -> Any:
    """The same step replayed from a CUDA graph."""
    device = step.precision.device
    if device.type != "cuda":
        raise SkippedError("CUDA graphs need a CUDA device")
    return CapturedStep(step)  # type: ignore[arg-type]


def flop_per_image(config: Config, macs: int, o: argparse.Namespace) -> int:
    """Of one step; the passes of the objective are counted by calling it."""

    class Counter(nn.Module):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Counter.passes += 1
            return torch.zeros(len(x), 10, requires_grad=True)

    objective, x = config.objective.build(), torch.rand(2, 3, 8, 8)
    objective.outer(Counter(), x, x, torch.tensor([0, 1]), {})
    clean = int(config.budget.build().uses_logits or objective.uses_clean)
    return 2 * macs * (clean + 2 * config.attack.steps + 3 * Counter.passes)


def warm_up(o: argparse.Namespace) -> None:
    """A step of a tiny model, so that the first variant's memory is not that of libraries being loaded."""
    tiny = argparse.Namespace(**vars(o) | {"model": "smallresnet-2", "batch": 2, "size": 8, "tune": False})
    build(Variant(torch.float32, torch.contiguous_format), recipe(RECIPES[0]), Batches.random(tiny), tiny)(0)


def timed(run: Run, start: int, o: argparse.Namespace) -> float:
    """Seconds a step, over as many steps as a round has."""

    def steps() -> None:
        for number in range(start, start + o.steps):
            run(number)

    return seconds(steps, o.device) / o.steps


def measure(name: str, o: argparse.Namespace, deadline: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one recipe, and what was measured beside them."""
    config, batches = recipe(name), Batches.random(o)
    model_name = o.model or config.model.name
    flop = flop_per_image(config, multiply_adds(build_model(model_name, num_classes=10), o.size), o)
    running: dict[str, Run] = {}
    notes: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    known = variants(torch.bfloat16)
    for variant, kind in known.items():
        if o.only and not any(word in variant for word in o.only):
            continue
        try:
            if kind.compiled and (o.no_compile or time.monotonic() > deadline):
                raise SkippedError("--no-compile" if o.no_compile else "out of time")
            with Memory(o.device) as memory:
                run = build(kind, config, batches, o)
                started = time.perf_counter()
                loss = run(0).item()
                first = time.perf_counter() - started
                run(1).item()
            if not loss < float("inf"):
                raise RuntimeError(f"its loss is {loss}")
        except Exception as error:  # a variant that cannot run is named, and the others go on
            skipped[variant] = reason(error)
            print(f"{name}: skipped {variant}: {skipped[variant]}", flush=True)
            continue
        running[variant] = run
        mib = None if memory.bytes is None else memory.bytes / 2**20
        notes[variant] = {"loss": loss, "first_step_seconds": first, "memory_mib": mib}
    times: dict[str, list[float]] = {variant: [] for variant in running}
    rates: dict[str, list[float]] = {"low": [], "float32": []}
    load = []
    for turn in range(o.rounds):
        if turn and time.monotonic() > deadline:
            break
        rates["low"].append(matrix_rate(torch.bfloat16, o.device))
        rates["float32"].append(matrix_rate(torch.float32, o.device))
        load.append(os.getloadavg()[0])
        for variant, run in running.items():
            times[variant].append(timed(run, 2 + turn * o.steps, o))
    rows = []
    for variant, taken in times.items():
        ceiling = rates["float32" if known[variant].dtype == torch.float32 else "low"]
        base = times[next(iter(times))]
        speed = spread([flop * o.batch / t for t in taken])
        faster = spread([b / t for t, b in zip(taken, base, strict=True)])
        share = spread([flop * o.batch / t / r for t, r in zip(taken, ceiling, strict=True)])
        step = statistics.median(taken)
        row = {
            "recipe": name,
            "variant": variant,
            "faster": faster["median"],
            "images_per_second": o.batch / step,
            "epoch_seconds": EPOCH * step / o.batch,
            "gflops": speed["median"] / 1e9,
            "share": share["median"],
            **notes[variant],
            "faster_spread": faster,
            "share_spread": share,
            "seconds": taken,
        }
        rows.append(row)
        print(
            f"{name:20s} {variant:28s} {row['faster']:5.2f}x ({faster['min']:.2f} to {faster['max']:.2f}) "
            f"{row['images_per_second']:10.1f} images/s {row['epoch_seconds']:9.1f} s an epoch "
            f"{row['share']:5.0%} of the product's rate",
            flush=True,
        )
    found = {k: spread(v) for k, v in rates.items() if v}
    return rows, {"skipped": skipped, "matrix_flop_per_second": found, "load": load, "flop_per_image": flop}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--model", default="", help="instead of the recipes'")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=0, help="in each reading of the clock; 0: 20 on CUDA, else 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no round is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name holds one of these words")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--tune", action="store_true", help="choose the twin's convolutions by measurement")
    parser.add_argument("--json", type=Path, help="where to write the results")
    o = parser.parse_args(arguments)
    if o.threads:
        torch.set_num_threads(o.threads)
    o.device, o.choices, o.classes = torch.device(o.device), {}, 10
    o.steps = o.steps or (20 if o.device.type == "cuda" else 1)
    kept = keep_freed_memory() if o.device.type == "cpu" else None
    warm_up(o)
    started, rows, beside = time.monotonic(), [], {}
    for done, name in enumerate(o.recipes, 1):
        share = o.budget * done / len(o.recipes)  # of the time, to each recipe as much
        found, beside[name] = measure(name, o, started + share)
        rows += found
    if o.json:
        settings = {k: getattr(o, k) for k in ("model", "batch", "size", "steps", "tune")}
        more = {"freed_memory_kept": kept, "beside": beside, "choices": o.choices}
        write_results(o.json, o.device, COLUMNS, rows, **settings, **more)


if __name__ == "__main__":
    main()
