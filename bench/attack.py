"""PGD attacks in turn in one run: this project's against those of other packages, with the rate of the machine.

    python bench/attack.py --json bench/results/attack-resnet-18-cpu.json
    python bench/attack.py --model wrn-34-10 --batch 32 --rounds 3 --json ...

Every attack is 10 steps of 2/255 in the l-infinity ball of 8/255 on the same random images, model and batch,
the model in eval mode. Peers run as their users run them (float32) and with what such a user can add without
changing the package: bf16 autocast with channels-last and, by option, torch.compile. A round times each once, so
ratios are between neighbours in time. FLOP/s count a forward pass and an input gradient per step, and stand
beside matrix products of the same run. What an attack attains is judged by the float32 model: its loss at the
attack's images, relative to that of this project's eager float32 attack. On the CPU freed memory is kept, as
this project's trainer does, except for peers as used, which have the C library's own habit.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
import torch.nn.functional as F
from measure import (
    SkippedError,
    hand_back_freed_memory,
    keep_freed_memory,
    matrix_rate,
    multiply_adds,
    reason,
    seconds,
    spread,
    write_results,
)
from peers import EPS, PEERS, Attack, peer
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.attacks.inner import cross_entropy
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision, cpu_has_bf16
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.models import build_model

REFERENCE = "mwpb eager fp32"
KINDS = {"as used": "as used", "tuned by their user": "autocast"}
COLUMNS = (
    ("name", "attack", ""),
    ("slower", "times the first's time", ".2f"),
    ("ms", "ms per image and step", ".3f"),
    ("gflops", "GFLOP/s", ",.0f"),
    ("share", "share of the matrix rate", ".0%"),
    ("loss_ratio", "loss after the attack, against eager float32", ".4f"),
)

# this project -------------------------------------------------------------------------------------------------


def ours(
    model: nn.Module, dtype: torch.dtype, twin: bool, o: argparse.Namespace, compiled: bool = False
) -> Attack:
    """The trainer's attack: Gaussian start, closed-form logit gradients, one fused step. The twin's refresh is
    part of the time."""
    if dtype == torch.bfloat16 and o.device.type == "cpu" and not cpu_has_bf16():
        raise SkippedError("this CPU has no bfloat16")
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = Precision(o.device, dtype, torch.channels_last, oracle=False)
    sample = torch.rand(o.batch, 3, o.size, o.size, device=o.device).contiguous(memory_format=torch.channels_last)
    net: Any = TwinNet(model, precision, sample) if twin else EagerNet(model, precision)
    if twin and o.tune:
        o.choices[f"twin {dtype}"] = tune(net, sample)
    if compiled:
        net.graph = torch.compile(net.graph)
    attack = pgd.Config(steps=o.steps, step_size=Fraction(2, 255)).build()
    radius = torch.full((o.batch,), EPS, device=o.device)
    index = torch.arange(o.batch, device=o.device)
    key = torch.tensor([ops.derive_seed(0, 1)], device=o.device)

    def run(x: Tensor, y: Tensor) -> Tensor:
        if twin:
            net.refresh()
        x = x.contiguous(memory_format=torch.channels_last)
        return attack(net, x, y, None, radius, cross_entropy, key, index)

    return run


def captured(attack: Attack, x: Tensor, y: Tensor) -> Attack:
    """The same attack replayed from a CUDA graph."""
    if x.device.type != "cuda":
        raise SkippedError("CUDA graphs need a CUDA device")
    inputs = x.clone(), y.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            attack(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attack(*inputs)

    def replay(x: Tensor, y: Tensor) -> Tensor:
        inputs[0].copy_(x)
        inputs[1].copy_(y)
        graph.replay()
        return result

    return replay


def contestants(model: nn.Module, o: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, Callable[[], Attack]]:
    fp32, bf16 = torch.float32, torch.bfloat16
    found: dict[str, Callable[[], Attack]] = {
        "mwpb twin bf16": lambda: ours(model, bf16, True, o),
        "mwpb twin fp32": lambda: ours(model, fp32, True, o),
        REFERENCE: lambda: ours(model, fp32, False, o),
    }
    if o.compile:
        found["mwpb twin bf16, compiled"] = lambda: ours(model, bf16, True, o, compiled=True)
    if o.device.type == "cuda":
        found["mwpb twin bf16, graph"] = lambda: captured(ours(model, bf16, True, o), x, y)
    variants = ["as used", "autocast channels-last"] + (["autocast channels-last compile"] if o.compile else [])
    for name, build in PEERS.items():
        for variant in variants:
            found[f"{name}, {variant}"] = lambda b=build, v=variant: peer(b, model, v, o.steps)  # type: ignore[misc]
    return found


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet-18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name holds one of these words")
    parser.add_argument("--compile", action="store_true", help="peers with torch.compile as well")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no round is begun")
    parser.add_argument("--tune", action="store_true", help="choose the twin's convolutions by measurement")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process; with --threads 1")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser


def main(arguments: list[str] | None = None) -> None:
    o = options().parse_args(arguments)
    started = time.monotonic()
    if o.threads:
        torch.set_num_threads(o.threads)
    o.device, o.choices = torch.device(o.device), {}
    o.clock = time.process_time if o.cpu_time else time.perf_counter
    kept = keep_freed_memory() and hand_back_freed_memory() if o.device.type == "cpu" else None
    torch.manual_seed(0)
    model = build_model(o.model, num_classes=10).to(o.device).eval()
    flop = 4 * multiply_adds(model, o.size) * o.batch * o.steps
    batches = []
    for _ in range(2):
        x = torch.rand(o.batch, 3, o.size, o.size, device=o.device)
        batches.append((x, torch.randint(10, (o.batch,), device=o.device)))
    running: dict[str, Attack] = {}
    skipped: dict[str, str] = {}
    losses: dict[str, float] = {}
    for name, build in contestants(model, o, *batches[0]).items():
        if o.only and not any(word in name for word in o.only):
            continue
        try:
            if running and time.monotonic() - started > o.budget:
                raise SkippedError("out of time")
            running[name] = build()
            x_adv = running[name](*batches[0])
            with torch.no_grad():
                losses[name] = F.cross_entropy(model(x_adv.float()), batches[0][1]).item()
            moved = (x_adv - batches[0][0]).abs().max().item()
            if not 0 < moved <= EPS + 1e-5:
                raise RuntimeError(f"left its ball: moved by {moved * 255:.3f}/255")
        except Exception as error:  # a contestant that cannot run is named, and the others go on
            running.pop(name, None)
            skipped[name] = reason(error)
            print(f"skipped {name}: {skipped[name]}", flush=True)
    if not running:
        raise SystemExit("every contestant was skipped")
    times: dict[str, list[float]] = {name: [] for name in running}
    rates: dict[str, list[float]] = {"bf16": [], "fp32": []}
    load = []
    for turn in range(o.rounds):
        if turn and time.monotonic() - started > o.budget:
            break
        rates["bf16"].append(matrix_rate(torch.bfloat16, o.device, o.clock))
        rates["fp32"].append(matrix_rate(torch.float32, o.device, o.clock))
        load.append(os.getloadavg()[0])
        x, y = batches[turn % 2]
        for name, attack in running.items():
            if kept:
                (hand_back_freed_memory if name.endswith("as used") else keep_freed_memory)()
                attack(x, y)  # to meet the memory as this contestant leaves it
            times[name].append(seconds(lambda: attack(x, y), o.device, o.clock))  # noqa: B023
        print(f"round {turn + 1}/{o.rounds}, load {load[-1]:.1f}", flush=True)
    rows = table(o, times, rates, losses, flop)
    if o.json:
        settings = {k: getattr(o, k) for k in ("model", "batch", "size", "steps", "tune")}
        write_results(
            o.json,
            o.device,
            COLUMNS,
            rows,
            **settings,
            clock="CUDA events" if o.device.type == "cuda" else "CPU time" if o.cpu_time else "wall time",
            freed_memory_kept="except for peers as used" if kept else kept,
            rounds=len(load),
            first=rows[0]["name"],
            fastest_peer=fastest(times),
            matrix_flop_per_second={k: spread(v) for k, v in rates.items()},
            skipped=skipped,
            load=load,
            choices=o.choices,
        )


def table(
    o: argparse.Namespace,
    times: dict[str, list[float]],
    rates: dict[str, list[float]],
    losses: dict[str, float],
    flop: float,
) -> list[dict[str, Any]]:
    """Rows by name, ratios first: to the first contestant's time (the bf16 twin's, where it runs) in the same
    round."""
    base = next(iter(times))
    rows = []
    for name, taken in times.items():
        ceiling = rates["bf16" if "bf16" in name or "autocast" in name else "fp32"]
        slower = spread([t / b for t, b in zip(taken, times[base], strict=True)])
        share = spread([flop / t / r for t, r in zip(taken, ceiling, strict=True)])
        row = {
            "name": name,
            "slower": slower["median"],
            "ms": statistics.median(taken) / o.batch / o.steps * 1e3,
            "gflops": flop / statistics.median(taken) / 1e9,
            "share": share["median"],
            "loss": losses[name],
            "loss_ratio": losses[name] / losses[REFERENCE] if REFERENCE in losses else None,
            "slower_spread": slower,
            "share_spread": share,
            "seconds": taken,
        }
        rows.append(row)
        print(
            f"{name:48s} {row['slower']:6.2f}x ({slower['min']:.2f} to {slower['max']:.2f})  "
            f"{row['ms']:8.3f} ms {row['gflops']:8.0f} GFLOP/s  {row['share']:5.0%} of the product's"
        )
    for kind, found in fastest(times).items():
        print(f"fastest peer {kind}: {found['name']}, {found['slower']['median']:.2f}x the time of {base}")
    return rows


def fastest(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """For peers as used, and for peers as their users may tune them: the fastest, and how many times the first
    contestant's time it takes."""
    base = next(iter(times))
    found = {}
    for kind, word in KINDS.items():
        peers = {n: statistics.median(t) for n, t in times.items() if word in n}
        if peers:
            name = min(peers, key=peers.__getitem__)
            slower = spread([t / b for t, b in zip(times[name], times[base], strict=True)])
            found[kind] = {"name": name, "slower": slower}
    return found


if __name__ == "__main__":
    main()
