"""PGD attacks in turn in one run: this project's against those of other packages, with the rate of the machine.

    python bench/attack.py --json bench/results/attack-resnet-18-cpu.json
    python bench/attack.py --model wrn-34-10 --batch 32 --rounds 3 --json ...

Every attack is 10 steps of 2/255 in the l-infinity ball of 8/255 on the same random images, model and batch,
the model in eval mode. Peers run as their users run them (float32) and with what such a user can add without
changing the package: bf16 autocast with channels-last and, by option, torch.compile. A round times each once, so
ratios are between neighbours in time. FLOP/s count a forward pass and an input gradient per step, and stand
beside matrix products of the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
from peers import EPS, PEERS, Attack, SkippedError, peer
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.attacks.inner import cross_entropy
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision, cpu_has_bf16
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.log import environment
from mwpb_fast.models import build_model

# this project -------------------------------------------------------------------------------------------------


def ours(model: nn.Module, dtype: torch.dtype, twin: bool, o: argparse.Namespace) -> Attack:
    """The trainer's attack: Gaussian start, closed-form logit gradients, one fused step. The twin's refresh is
    part of the time."""
    if dtype == torch.bfloat16 and o.device.type == "cpu" and not cpu_has_bf16():
        raise SkippedError("this CPU has no bfloat16")
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = Precision(o.device, dtype, torch.channels_last, oracle=False)
    sample = torch.rand(o.batch, 3, o.size, o.size, device=o.device).contiguous(
        memory_format=torch.channels_last
    )
    net: Any = TwinNet(model, precision, sample) if twin else EagerNet(model, precision)
    if twin and o.tune:
        o.choices[f"twin {dtype}"] = tune(net, sample)
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


def contestants(
    model: nn.Module, o: argparse.Namespace, x: Tensor, y: Tensor
) -> dict[str, Callable[[], Attack]]:
    fp32, bf16 = torch.float32, torch.bfloat16
    found: dict[str, Callable[[], Attack]] = {
        "mwpb twin bf16": lambda: ours(model, bf16, True, o),
        "mwpb twin fp32": lambda: ours(model, fp32, True, o),
        "mwpb eager fp32": lambda: ours(model, fp32, False, o),
    }
    if o.device.type == "cuda":
        found["mwpb twin bf16, graph"] = lambda: captured(ours(model, bf16, True, o), x, y)
    variants = ["as used", "autocast channels-last"] + (
        ["autocast channels-last compile"] if o.compile else []
    )
    for name, build in PEERS.items():
        for variant in variants:
            found[f"{name}, {variant}"] = lambda b=build, v=variant: peer(b, model, v, o.steps)  # type: ignore[misc]
    return found


# measuring ----------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cuda":
        start = clock()
        run()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def matrix_rate(dtype: torch.dtype, o: argparse.Namespace) -> float:
    """FLOP/s of a large square product, the best of three."""
    n = 8192 if o.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=o.device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b), o.device, o.clock) for _ in range(3))


def multiply_adds(model: nn.Module, size: int) -> int:
    """Of one image's forward pass, in convolutions and linear layers."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = out.shape[2] * out.shape[3] if out.dim() == 4 else 1
        total += weight.numel() * positions

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_hook(count) for m in layers]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return total


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = (sorted(values)[int(q * (len(values) - 1))] for q in (0, 0.5, 1))
    return {"median": statistics.median(values) if values else middle, "min": low, "max": high}


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet-18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="*", default=[], help="contestants whose name holds one of these words"
    )
    parser.add_argument("--compile", action="store_true", help="peers with torch.compile as well")
    parser.add_argument("--tune", action="store_true", help="choose the twin's convolutions by measurement")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of the process; with --threads 1"
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def main() -> None:
    o = options()
    if o.threads:
        torch.set_num_threads(o.threads)
    o.device, o.choices = torch.device(o.device), {}
    o.clock = time.process_time if o.cpu_time else time.perf_counter
    torch.manual_seed(0)
    model = build_model(o.model, num_classes=10).to(o.device).eval()
    flop = 4 * multiply_adds(model, o.size) * o.batch * o.steps
    batches = []
    for _ in range(2):
        x = torch.rand(o.batch, 3, o.size, o.size, device=o.device)
        batches.append((x, torch.randint(10, (o.batch,), device=o.device)))
    running: dict[str, Attack] = {}
    skipped: dict[str, str] = {}
    for name, build in contestants(model, o, *batches[0]).items():
        if o.only and not any(word in name for word in o.only):
            continue
        try:
            running[name] = build()
            x_adv = running[name](*batches[0])
            moved = (x_adv - batches[0][0]).abs().max().item()
            if not 0 < moved <= EPS + 1e-5:
                raise RuntimeError(f"left its ball: moved by {moved * 255:.3f}/255")
        except Exception as error:  # a contestant that cannot run is named, and the others go on
            running.pop(name, None)
            skipped[name] = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"skipped {name}: {skipped[name]}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in running}
    rates: dict[str, list[float]] = {"bf16": [], "fp32": []}
    load = []
    for turn in range(o.rounds):
        rates["bf16"].append(matrix_rate(torch.bfloat16, o))
        rates["fp32"].append(matrix_rate(torch.float32, o))
        load.append(os.getloadavg()[0])
        x, y = batches[turn % 2]
        for name, attack in running.items():
            times[name].append(seconds(lambda: attack(x, y), o.device, o.clock))  # noqa: B023
        print(f"round {turn + 1}/{o.rounds}, load {load[-1]:.1f}", flush=True)
    result = report(o, times, rates, flop) | {"skipped": skipped, "load": load, "choices": o.choices}
    if o.json:
        o.json.parent.mkdir(parents=True, exist_ok=True)
        o.json.write_text(json.dumps(result, indent=1) + "\n")


def report(
    o: argparse.Namespace, times: dict[str, list[float]], rates: dict[str, list[float]], flop: float
) -> dict[str, Any]:
    """Rows by name, ratios first: to the bf16 twin's time in the same round, or to the first row's."""
    base = next(iter(times))
    rows = []
    for name, taken in times.items():
        ceiling = rates["bf16" if "bf16" in name or "autocast" in name else "fp32"]
        rows.append(
            {
                "name": name,
                "slower_than_first": spread([t / b for t, b in zip(taken, times[base], strict=True)]),
                "ms_per_image_step": spread([t / o.batch / o.steps * 1e3 for t in taken]),
                "flop_per_second": flop / statistics.median(taken),
                "share_of_matrix_rate": spread([flop / t / r for t, r in zip(taken, ceiling, strict=True)]),
            }
        )
        ratio, share = rows[-1]["slower_than_first"], rows[-1]["share_of_matrix_rate"]
        print(
            f"{name:48s} {ratio['median']:6.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})  "
            f"{rows[-1]['ms_per_image_step']['median']:8.3f} ms {rows[-1]['flop_per_second'] / 1e9:8.0f} GFLOP/s  "
            f"{share['median']:5.0%} of the product's"
        )
    kinds = {"as used": "as used", "tuned by their user": "autocast"}
    fastest = {}
    for kind, word in kinds.items():
        peers = {n: statistics.median(t) for n, t in times.items() if word in n}
        if peers:
            name = min(peers, key=peers.__getitem__)
            ratio = spread([t / b for t, b in zip(times[name], times[base], strict=True)])
            fastest[kind] = {"name": name, "slower_than_first": ratio}
            print(f"fastest peer {kind}: {name}, {ratio['median']:.2f}x the time of {base}")
    return {
        "environment": environment(o.device) | {"commit": commit()},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "clock": "CUDA events" if o.device.type == "cuda" else "CPU time" if o.cpu_time else "wall time",
        "model": o.model,
        "batch": o.batch,
        "steps": o.steps,
        "rounds": o.rounds,
        "first": base,
        "rows": rows,
        "fastest_peer": fastest,
        "matrix_flop_per_second": {k: spread(v) for k, v in rates.items()},
    }


if __name__ == "__main__":
    main()
