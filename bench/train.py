"""The whole training step of MWPB-AT, -TRADES and -MART: this project's engines in turn in one run.

    python bench/train.py --json bench/results/train-resnet-18-cpu.json
    python bench/train.py --recipes table2.mwpb_at --batch 128 --json ...

Budget, attack, objective and optimiser are those of the named recipes, in the second phase, where the radii
follow the margins; the images are random. The variants: the model itself in float32; the same in bf16 autocast
and channels-last; with the attack on the folded twin; with training forward and backward compiled besides; and
the step captured in a CUDA graph; and both. A round times each once, so ratios are between neighbours in time.
What needs no compiler is timed first, for all recipes; then, recipe by recipe, what is compiled, beside the first
variant timed anew. FLOP are those of convolutions and linear layers: two a multiply-add, a forward pass and an
input gradient for each attack step, one more forward pass where the margin or the objective asks for it, three
for every training pass. Convolutions in float32 are TF32 on CUDA, as they are by PyTorch's default, and stand
beside TF32 products. The result file is written after every round; the same command goes on with what it lists as
unfinished.
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
from ceilings import arithmetic, matrix_rates, multiply_adds, refuse_emulated
from measure import Memory, SkippedError, keep_freed_memory, seconds, spread
from record import Results
from torch import Tensor, nn

from mwpb_fast.capture import CapturedStep
from mwpb_fast.config import Config, recipe
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.recorder import WARM_UP
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Batch, Method
from mwpb_fast.models import build_model
from mwpb_fast.optim import make_optimizer
from mwpb_fast.step import Step

EPOCH = 50_000  # images
LEAST_ROUNDS = 3  # whatever the budget
LEFT_OUT = "it ran without what was compiled for it"
PLAIN_SHARE = 0.6  # of the budget, for what is not compiled
COMPILED = ", compiled"  # marks a recipe's part of the results
RECIPES = ("table1.mwpb_at", "table1.mwpb_trades", "table1.mwpb_mart")
COLUMNS = (
    ("recipe", "recipe", ""),
    ("variant", "step", ""),
    ("arithmetic", "convolutions in", ""),
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
    """By name, in the order in which they are timed."""
    plain, last = torch.contiguous_format, torch.channels_last
    name = str(low).removeprefix("torch.")
    return {
        "eager float32": Variant(torch.float32, plain),
        f"eager {name} channels-last": Variant(low, last),
        f"twin {name}": Variant(low, last, twin=True),
        f"twin {name} captured": Variant(low, last, twin=True, captured=True),
        f"twin {name} compiled": Variant(low, last, twin=True, compiled=True),
        f"twin {name} captured compiled": Variant(low, last, twin=True, compiled=True, captured=True),
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
    """step(batch, key, method) over a model and an optimiser of its own, for images like the sample."""
    refuse_emulated(variant.dtype, o.device)
    torch.manual_seed(0)
    precision = Precision(o.device, variant.dtype, variant.layout, oracle=False)
    model = build_model(o.model or config.model.name, num_classes=o.classes, channels=sample.shape[1])
    model = model.to(device=o.device, memory_format=variant.layout)  # type: ignore[call-overload]
    net: Any = TwinNet(model, precision, sample) if variant.twin else EagerNet(model, precision)
    if variant.twin and o.tune:
        o.choices[config.recipe] = tune(net, sample)
    step = Step(
        model=torch.compile(model, backend=counted) if variant.compiled else model,  # type: ignore[arg-type]
        net=net,
        optimizer=make_optimizer(model, config.optim),
        precision=precision,
        attack_mode=config.attack_mode,
    )
    return captured(step) if variant.captured else step


def counted(graph: Any, inputs: Any) -> Callable[..., Any]:
    """torch.compile's own backend; `counted.calls` are the runs of what it has compiled."""
    from torch._inductor.compile_fx import compile_fx

    run = compile_fx(graph, inputs)

    def call(*arguments: Any) -> Any:
        counted.calls += 1
        return run(*arguments)

    return call


counted.calls = 0


def build(variant: Variant, config: Config, batches: Batches, o: argparse.Namespace) -> Run:
    """The step over the given batches by turns."""
    images = [x.contiguous(memory_format=variant.layout) for x in batches.x]
    step, method = make_step(variant, config, images[0], o), Method.build(config)

    def run(number: int) -> Tensor:
        turn = number % len(images)
        return step(Batch(images[turn], batches.y[turn], batches.index), batches.key, method).loss

    return run


def captured(step: Step) -> Any:
    """The same step replayed from a CUDA graph."""
    device = step.precision.device
    if device.type != "cuda":
        raise SkippedError("CUDA graphs need a CUDA device")
    return CapturedStep(step)


def flop_per_image(config: Config, macs: int, o: argparse.Namespace) -> int:
    """Of one step; the passes of the objective are counted by calling it."""

    class Counter(nn.Module):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Counter.passes += 1
            return torch.zeros(len(x), 10, requires_grad=True)

    method, x = Method.build(config), torch.rand(2, 3, 8, 8)
    method.objective.outer(Counter(), x, x, torch.tensor([0, 1]), {})
    return 2 * macs * (method.uses_clean + 2 * config.attack.steps + 3 * Counter.passes)


def warm_up(o: argparse.Namespace) -> None:
    """A step of a tiny model, so that the first variant's memory is not that of libraries being loaded."""
    tiny = argparse.Namespace(**vars(o) | {"model": "smallresnet-16", "batch": 2, "size": 8, "tune": False})
    build(Variant(torch.float32, torch.contiguous_format), recipe(RECIPES[0]), Batches.random(tiny), tiny)(0)


def timed(run: Run, start: int, o: argparse.Namespace) -> float:
    """Seconds a step, over as many steps as a round has."""

    def steps() -> None:
        for number in range(start, start + o.steps):
            run(number)

    return seconds(steps, o.device) / o.steps


def prepare(
    name: str, kinds: dict[str, Variant], config: Config, o: argparse.Namespace, results: Results
) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """Those of the variants that run, after two steps each, and what was noted of the first."""
    running: dict[str, Run] = {}
    notes: dict[str, dict[str, Any]] = {}
    batches = Batches.random(o)
    for variant, kind in kinds.items():
        label = f"{name}: {variant}"
        if label in results.skipped:
            continue
        before, expected = counted.calls, WARM_UP + 1 if kind.captured else 2
        try:
            with Memory(o.device) as memory:
                run = build(kind, config, batches, o)
                started = time.perf_counter()
                loss = run(0).item()
                first = time.perf_counter() - started
                run(1).item()
            if not loss < float("inf"):
                raise RuntimeError(f"its loss is {loss}")
            if kind.compiled and counted.calls < before + expected:
                raise RuntimeError(LEFT_OUT)
        except Exception as error:  # a variant that cannot run is named, and the others go on
            results.skip(label, error)
            continue
        running[variant] = run
        mib = None if memory.bytes is None else memory.bytes / 2**20
        notes[variant] = {"loss": loss, "first_step_seconds": first, "memory_mib": mib}
    if LEFT_OUT in results.skipped.values():
        torch.compiler.reset()  # what made PyTorch pass over the compiled code would hold for the others, too
    for variant in [v for v in running if kinds[v].compiled and not kinds[v].captured]:
        before = counted.calls
        running[variant](2).item()
        if counted.calls == before:
            running.pop(variant)
            results.skip(f"{name}: {variant}", RuntimeError(LEFT_OUT))
    return running, notes


def measure(part: str, o: argparse.Namespace, results: Results, deadline: float) -> None:
    """Put the rows of one recipe's part. Those of its compiled part are relative to the first variant of the
    other, timed anew in the same rounds."""
    name = part.removesuffix(COMPILED)
    config, known = recipe(name), variants(torch.bfloat16)
    model = build_model(o.model or config.model.name, num_classes=10)
    flop = o.batch * flop_per_image(config, multiply_adds(model, o.size), o)
    kinds = {
        variant: kind
        for variant, kind in known.items()
        if kind.compiled == part.endswith(COMPILED) and (not o.only or any(word in variant for word in o.only))
    }
    before = next((row["variant"] for row in results.rows if row["part"] == name != part), None)
    running, notes = prepare(name, ({before: known[before]} if before else {}) | kinds, config, o, results)
    times: dict[str, list[float]] = {variant: [] for variant in running}
    rates: dict[str, list[float]] = {}
    load: list[float] = []
    rows: list[dict[str, Any]] = []
    for turn in range(o.rounds if set(running) - {before} else 0):
        if turn >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        for kind, rate in matrix_rates(o.device).items():
            rates.setdefault(kind, []).append(rate)
        load.append(os.getloadavg()[0])
        for variant, run in running.items():
            times[variant].append(timed(run, 2 + turn * o.steps, o))
        rows = [
            row_of(name, variant, arithmetic(known[variant].dtype, o.device), times, rates, flop, o)
            | notes[variant]
            for variant in running
            if variant != before
        ]
        ceilings = {k: spread(v) for k, v in rates.items()}
        results.more["beside"][part] = {"matrix_flop_per_second": ceilings, "load": load, "flop_per_step": flop}
        results.put(part, rows, done=False)
    results.put(part, rows)
    for row in rows:
        say(row)


def row_of(
    name: str,
    variant: str,
    kind: str,
    times: dict[str, list[float]],
    rates: dict[str, list[float]],
    flop: float,
    o: argparse.Namespace,
) -> dict[str, Any]:
    """Of a variant whose convolutions are computed in `kind`; flop: of a step."""
    taken, base = times[variant], times[next(iter(times))]
    speed = spread([flop / t for t in taken])
    faster = spread([b / t for t, b in zip(taken, base, strict=True)])
    share = spread([flop / t / r for t, r in zip(taken, rates[kind], strict=True)])
    step = statistics.median(taken)
    return {
        "recipe": name,
        "variant": variant,
        "arithmetic": kind,
        "faster": faster["median"],
        "images_per_second": o.batch / step,
        "epoch_seconds": EPOCH * step / o.batch,
        "gflops": speed["median"] / 1e9,
        "share": share["median"],
        "faster_spread": faster,
        "share_spread": share,
        "seconds": taken,
    }


def say(row: dict[str, Any]) -> None:
    faster = row["faster_spread"]
    print(
        f"{row['recipe']:20s} {row['variant']:32s} {row['faster']:5.2f}x ({faster['min']:.2f} to "
        f"{faster['max']:.2f}) {row['images_per_second']:10.1f} images/s {row['epoch_seconds']:9.1f} s an epoch "
        f"{row['share']:5.0%} of the product's rate in {row['arithmetic']}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--model", default="", help="instead of the recipes'")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=0, help="in each reading of the clock; 0: 20 on CUDA, else 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=1e9, help="seconds; what will not fit is left for the next run"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name holds one of these words")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--tune", action="store_true", help="choose the twin's convolutions by measurement")
    parser.add_argument("--json", type=Path, help="where to write the results")
    o = parser.parse_args(arguments)
    if o.threads:
        torch.set_num_threads(o.threads)
    o.device, o.classes = torch.device(o.device), 10
    o.steps = o.steps or (20 if o.device.type == "cuda" else 1)
    torch.backends.cudnn.benchmark = o.tune  # as the trainer has it
    kept = keep_freed_memory() if o.device.type == "cpu" else None
    settings = {k: getattr(o, k) for k in ("model", "batch", "size", "steps", "tune", "no_compile")}
    parts = [*o.recipes, *([] if o.no_compile else [name + COMPILED for name in o.recipes])]
    more = {"freed_memory_kept": kept, "beside": {}, "choices": {}}
    results = Results(o.json, o.device, COLUMNS, parts, **settings, **more)
    o.choices = results.more["choices"]
    started = time.monotonic()
    warm_up(o)
    plain = [part for part in results.unfinished if not part.endswith(COMPILED)]
    for done, part in enumerate(plain, 1):
        measure(part, o, results, started + PLAIN_SHARE * o.budget * done / len(plain))
    for part in results.fitting(results.unfinished, started + o.budget):
        measure(part, o, results, started + o.budget)


if __name__ == "__main__":
    main()
