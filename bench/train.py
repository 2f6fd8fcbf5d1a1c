"""The whole training step of MWPB-AT, -TRADES and -MART: this project's engines in turn in one run.

    python bench/train.py --json bench/results/train-resnet-18-cpu.json
    python bench/train.py --recipes table2.mwpb_at --batch 128 --json ...

Budget, attack, objective and optimiser are those of the named recipes, in the second phase, where the radii
follow the margins; the images are random. The variants: the model itself in float32; the same in bf16 autocast
and channels-last; with the attack on the folded twin, in each of its variants; with batch norm, addition and ReLU
of the training pass in one op besides; with training forward and backward compiled besides; and the step captured
in a CUDA graph; and both. A round times each once, so ratios are between neighbours in time.
What needs no compiler is timed first, for all recipes; then, recipe by recipe, what is compiled, beside the first
variant timed anew. FLOP are those of convolutions and linear layers: two a multiply-add, a forward pass and an
input gradient for each attack step, one more forward pass where the margin or the objective asks for it, three
for every training pass. Convolutions in float32 are TF32 on CUDA, as they are by PyTorch's default, and stand
beside TF32 products. The result file is written after every round; the same command goes on with what it lists as
unfinished.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from typing import Any

import torch
from ceilings import arithmetic, multiply_adds
from kernel_profile import kernels
from measure import Memory, SkippedError, command_line, ratios, seconds, settled, spread
from record import Results
from rounds import Rounds
from steps import Batches, CompiledCode, Run, Variant, build, variants, warm_up
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.config import Config, recipe
from mwpb_fast.engine.recorder import WARM_UP
from mwpb_fast.method import Method
from mwpb_fast.models import build_model

EPOCH = 50_000  # images
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
    ("verified", "a replay is the eager step", ""),
    ("kernels", "kernels", ",d"),
    ("kernel_ms", "ms in kernels", ",.2f"),
)


def flop_per_image(config: Config, macs: int, o: argparse.Namespace) -> int:
    """Of one step; the passes of the objective are counted by calling it."""

    class Counter(nn.Module):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            Counter.passes += 1
            return torch.zeros(len(x), 10, requires_grad=True)

    assert isinstance(config.attack, pgd.Config)  # whose passes are counted here
    method, x = Method.build(config), torch.rand(2, 3, 8, 8)
    method.objective.outer(Counter(), x, x, torch.tensor([0, 1]), {})
    return 2 * macs * (method.uses_clean + 2 * config.attack.steps + 3 * Counter.passes)


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
        before, expected = CompiledCode.calls, WARM_UP + 1 if kind.captured else 2
        try:
            with Memory(o.device) as memory:
                run = build(kind, config, batches, o)
                started = time.perf_counter()
                loss = run(0).item()
                first = time.perf_counter() - started
                run(1).item()
            if not loss < float("inf"):
                raise RuntimeError(f"its loss is {loss}")
            if kind.compiled and CompiledCode.calls < before + expected:
                raise RuntimeError(LEFT_OUT)
        except Exception as error:  # a variant that cannot run is named, and the others go on
            if not isinstance(error, SkippedError):
                traceback.print_exc()
            results.skip(label, error)
            continue
        running[variant] = run
        mib = None if memory.bytes is None else memory.bytes / 2**20
        notes[variant] = {"loss": loss, "first_step_seconds": first, "memory_mib": mib}
    if LEFT_OUT in results.skipped.values():
        torch.compiler.reset()  # what made PyTorch pass over the compiled code would hold for the others, too
    for variant in [v for v in running if kinds[v].compiled and not kinds[v].captured]:
        before = CompiledCode.calls
        running[variant](2).item()
        if CompiledCode.calls == before:
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
        if kind.compiled == part.endswith(COMPILED)
        and (not o.only or any(word in variant for word in o.only))
        and not any(word in variant for word in o.without)
    }
    before = next((row["variant"] for row in results.rows if row["part"] == name != part), None)
    running, notes = prepare(name, ({before: known[before]} if before else {}) | kinds, config, o, results)
    times: dict[str, list[float]] = {variant: [] for variant in running}
    for run in running.values() if o.device.type == "cuda" else ():
        timed(run, 2, o)  # clocks rise with work, and a figure for an epoch must not hold how they did
    rounds = Rounds(o.rounds if set(running) - {before} else 0, deadline, o.device)
    rows: list[dict[str, Any]] = []
    for turn in rounds:
        for variant, run in running.items():
            times[variant].append(timed(run, 2 + turn * o.steps, o))
        rows = [
            row_of(name, variant, arithmetic(known[variant].dtype, o.device), times, rounds, flop, o)
            | notes[variant]
            for variant in running
            if variant != before
        ]
        results.more["beside"][part] = rounds.beside() | {"flop_per_step": flop}
        results.put(part, rows, done=False)
    for row in rows if o.profile else ():
        row |= looked_into(row["variant"], running[row["variant"]], name, o, results)
        results.put(part, rows, done=False)
    results.put(part, rows)
    for row in rows:
        say(row)


def looked_into(variant: str, run: Run, name: str, o: argparse.Namespace, results: Results) -> dict[str, Any]:
    """Of a variant's step: whether a replay is the eager step to the bit, and the number and time of its kernels,
    which stand one by one beside the rows."""
    found: dict[str, Any] = {}
    try:
        differing = run.verify()
        if differing is not None:
            found["verified"] = "yes" if not differing else f"no: {len(differing)}, such as {differing[0]}"
        listed = kernels(lambda: run(0), o.device)
        results.more["kernels"][f"{name}: {variant}"] = listed
        found["kernels"] = sum(row["count"] for row in listed)
        found["kernel_ms"] = sum(row["us"] for row in listed) / 1e3
    except Exception as error:  # what was timed counts without it
        traceback.print_exc()
        results.skip(f"{name}: {variant}, looked into", error)
    return found


def row_of(
    name: str,
    variant: str,
    kind: str,
    times: dict[str, list[float]],
    rounds: Rounds,
    flop: float,
    o: argparse.Namespace,
) -> dict[str, Any]:
    """Of a variant whose convolutions are computed in `kind`; flop: of a step."""
    taken, base = times[variant], times[next(iter(times))]
    speed = spread([flop / t for t in taken])
    faster = ratios(base, taken)
    share = rounds.shares(kind, flop, taken)
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
    parser = command_line(__doc__)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--model", default="", help="instead of the recipes'")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=0, help="in each reading of the clock; 0: 20 on CUDA, else 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=1e9, help="seconds; what will not fit is left for the next run"
    )
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name holds one of these words")
    parser.add_argument("--without", nargs="*", default=[], help="and without those whose name holds one of these")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--profile", action="store_true", help="verify what is captured, and list all kernels")
    parser.add_argument("--tune", action="store_true", help="choose the twin's convolutions by measurement")
    o = settled(parser.parse_args(arguments))
    o.steps = o.steps or (20 if o.device.type == "cuda" else 1)
    torch.backends.cudnn.benchmark = o.tune  # as the trainer has it
    settings = {k: getattr(o, k) for k in ("model", "batch", "size", "steps", "tune", "no_compile")}
    parts = [*o.recipes, *([] if o.no_compile else [name + COMPILED for name in o.recipes])]
    more: dict[str, Any] = {"freed_memory_kept": o.kept, "beside": {}, "choices": {}, "kernels": {}}
    results = Results(o.json, o.device, COLUMNS, parts, **settings, **more)
    o.choices = results.more["choices"]
    started = time.monotonic()
    warm_up(recipe(RECIPES[0]), o)
    plain = [part for part in results.unfinished if not part.endswith(COMPILED)]
    for done, part in enumerate(plain, 1):
        measure(part, o, results, started + PLAIN_SHARE * o.budget * done / len(plain))
    for part in results.fitting(results.unfinished, started + o.budget):
        measure(part, o, results, started + o.budget)


if __name__ == "__main__":
    main()
