"""PGD attacks in turn in one run: this project's against those of other packages, with the rate of the machine.

    python bench/attack.py --json bench/results/attack-resnet-18-cpu.json
    python bench/attack.py --model wrn-34-10 --batch 32 --rounds 3 --json ...

Every attack is 10 steps of 2/255 in the l-infinity ball of 8/255 on the same random images, model and batch, the
model in eval mode. Peers run as their users run them (float32) and with what such a user can add without changing
the package: bf16 autocast with channels-last and, by option, torch.compile. A round times each once, so ratios
are between neighbours in time. What is compiled comes later, one at a time, beside the first contestant timed
anew. FLOP/s count a forward pass and an input gradient per step, and stand beside matrix products of the same
run; convolutions in float32 are TF32 on CUDA, as they are by PyTorch's default, and so are those products. What
an attack attains is judged by the model in full float32: its loss at the attack's images, relative to that of
this project's eager attack, also in full float32. On the CPU freed memory is kept, as this project's trainer
does, except for peers as used, which have the C library's own habit. The result file is written after every
round; the same command goes on with what it lists as unfinished.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import mwpb_kernels as ops
import torch
import torch.nn.functional as F
from attack_rows import COLUMNS, REFERENCE, fastest, say, table
from ceilings import multiply_adds, refuse_emulated
from measure import command_line, full_float32, hand_back_freed_memory, keep_freed_memory, seconds, settled
from peers import EPS, PEERS, Attack, peer
from record import Results
from rounds import Rounds
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.halves import HalvesNet
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.recorder import WARM_UP, recorder_for
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import BY_HAND, BY_HAND_STEM, VARIANTS, TwinNet
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Batch
from mwpb_fast.models import build_model

PLAIN = "not compiled"  # the part of the results that needs no compiler

# this project -------------------------------------------------------------------------------------------------


def ours(
    model: nn.Module,
    dtype: torch.dtype,
    twin: bool,
    o: argparse.Namespace,
    compiled: bool = False,
    replayed: bool = False,
    variant: str = VARIANTS[0],
    halves: bool = False,
) -> Attack:
    """The trainer's attack: Gaussian start, closed-form logit gradients, one fused step. The twin's refresh is
    part of the time. halves: of the batch, at the same time. Compiled, it is not tuned: torch.compile breaks its
    graph at every fused cuDNN call; nor is a variant but the first, which has no calls to choose among."""
    refuse_emulated(dtype, o.device)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = Precision(o.device, dtype, torch.channels_last, oracle=False)
    sample = torch.rand(o.batch, 3, o.size, o.size, device=o.device).contiguous(memory_format=torch.channels_last)
    net: Any = TwinNet(model, precision, sample, variant=variant) if twin else EagerNet(model, precision)
    if twin and o.tune and not compiled and variant == VARIANTS[0]:
        o.choices[f"twin {dtype}{', graph' if replayed else ''}"] = tune(net, sample, captured=replayed)
    net = HalvesNet(net, o.device) if halves else net
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
        return attack(net, Batch(x, y, index), None, radius, cross_entropy, key)

    return run


def captured(attack: Attack, x: Tensor, y: Tensor) -> Attack:
    """The same attack replayed from a CUDA graph, for batches like x and y."""
    recorder, inputs = recorder_for(x.device), (x.clone(), y.clone())
    result: list[Tensor] = []

    def work() -> None:
        result[:] = [attack(*inputs)]

    for _ in range(WARM_UP):
        recorder.warm_up(work)
    recorder.capture(work)

    def replay(x: Tensor, y: Tensor) -> Tensor:
        inputs[0].copy_(x)
        inputs[1].copy_(y)
        recorder.replay()
        return result[0]

    return replay


def contestants(
    model: nn.Module, o: argparse.Namespace, x: Tensor, y: Tensor
) -> tuple[dict[str, Callable[[], Attack]], dict[str, Callable[[], Attack]]]:
    """By name, what makes each: those that need no compiler, and those that do, the most wanted first."""
    fp32, bf16 = torch.float32, torch.bfloat16
    plain: dict[str, Callable[[], Attack]] = {
        "mwpb twin bf16": lambda: ours(model, bf16, True, o),
        "mwpb twin fp32": lambda: ours(model, fp32, True, o),
        REFERENCE: lambda: ours(model, fp32, False, o),
    }
    for v in (BY_HAND, BY_HAND_STEM):
        plain[f"mwpb twin bf16, {v}"] = partial(ours, model, bf16, True, o, variant=v)
    if o.device.type == "cuda":
        for v in VARIANTS:
            name = f"mwpb twin bf16, {'' if v == VARIANTS[0] else f'{v}, '}graph"
            made = partial(ours, model, bf16, True, o, replayed=True, variant=v)
            plain[name] = lambda m=made: captured(m(), x, y)  # type: ignore[misc]
        halves = partial(ours, model, bf16, True, o, replayed=True, variant=BY_HAND, halves=True)
        plain["mwpb twin bf16, halves, graph"] = lambda: captured(halves(), x, y)
    for name, build in PEERS.items():
        for variant in ("as used", "autocast channels-last"):
            plain[f"{name}, {variant}"] = lambda b=build, v=variant: peer(b, model, v, o.steps)  # type: ignore[misc]
    compiled: dict[str, Callable[[], Attack]] = {}
    variant = "autocast channels-last compile"
    for name, build in sorted(PEERS.items(), key=lambda item: item[0] != "TRADES-style"):
        compiled[f"{name}, {variant}"] = lambda b=build: peer(b, model, variant, o.steps)  # type: ignore[misc]
        untuned = ", untuned" if o.tune else ""
        compiled.setdefault(
            f"mwpb twin bf16, compiled{untuned}", lambda: ours(model, bf16, True, o, compiled=True)
        )

    def wanted(found: dict[str, Callable[[], Attack]]) -> dict[str, Callable[[], Attack]]:
        return {n: make for n, make in found.items() if not o.only or any(word in n for word in o.only)}

    return wanted(plain), wanted(compiled) if o.compile else {}


def options() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="resnet-18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name holds one of these words")
    parser.add_argument("--compile", action="store_true", help="peers with torch.compile as well")
    parser.add_argument(
        "--budget", type=float, default=1e9, help="seconds; what will not fit is left for the next run"
    )
    parser.add_argument("--tune", action="store_true", help="choose the twin's convolutions by measurement")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process; with --threads 1")
    return parser


class Bench:
    """The contestants and two batches for them."""

    def __init__(self, o: argparse.Namespace, model: nn.Module) -> None:
        self.o, self.model = o, model
        self.flop = 4 * multiply_adds(model, o.size) * o.batch * o.steps
        self.batches = []
        for _ in range(2):
            x = torch.rand(o.batch, 3, o.size, o.size, device=o.device)
            self.batches.append((x, torch.randint(10, (o.batch,), device=o.device)))
        self.plain, self.compiled = contestants(model, o, *self.batches[0])

    def prepare(self, name: str, make: Callable[[], Attack]) -> tuple[Attack, float]:
        """The attack, and the loss that it attains."""
        attack, (x, y) = make(), self.batches[0]
        x_adv = attack(x, y)
        with full_float32():
            if name == REFERENCE:
                x_adv = attack(x, y)
            with torch.no_grad():
                loss = F.cross_entropy(self.model(x_adv.float()), y).item()
        moved = (x_adv - x).abs().max().item()
        if not 0 < moved <= EPS + 1e-5:
            raise RuntimeError(f"left its ball: moved by {moved * 255:.3f}/255")
        return attack, loss

    def run(self, part: str, results: Results, deadline: float) -> None:
        """Put the rows of a part: of all that is not compiled, or of one contestant that is, which is timed beside
        the first one."""
        o = self.o
        base = next((row["name"] for row in results.rows if row["part"] == PLAIN != part), None)
        makers = self.plain if part == PLAIN else {part: self.compiled[part]}
        running: dict[str, Attack] = {}
        losses: dict[str, float] = {}
        for name, make in (({base: self.plain[base]} if base else {}) | makers).items():
            if name in results.skipped:
                continue
            try:
                running[name], losses[name] = self.prepare(name, make)
            except Exception as error:  # a contestant that cannot run is named, and the others go on
                results.skip(name, error)
        times: dict[str, list[float]] = {name: [] for name in running}
        rounds = Rounds(o.rounds if set(running) - {base} else 0, deadline, o.device, o.clock)
        rows: list[dict[str, Any]] = []
        for turn in rounds:
            x, y = self.batches[turn % 2]
            for name, attack in running.items():
                times[name].append(self.timed(name, attack, x, y))
            earlier = {row["name"]: row["loss"] for row in results.rows}
            rows = table(o, times, rounds, earlier | losses, self.flop)
            rows = [row for row in rows if row["name"] != base]
            results.more["beside"][part] = rounds.beside()
            others = [row for row in results.rows if row["part"] != part]
            results.more["fastest_peer"] = fastest([*others, *rows])
            results.put(part, rows, done=False)
            print(f"{part}: round {turn + 1}/{o.rounds}, load {rounds.load[-1]:.1f}", flush=True)
        results.put(part, rows)
        for row in rows:
            say(row)

    def timed(self, name: str, attack: Attack, x: Tensor, y: Tensor) -> float:
        if self.o.kept:
            (hand_back_freed_memory if name.endswith("as used") else keep_freed_memory)()
            attack(x, y)  # to meet the memory as this contestant leaves it
        return seconds(lambda: attack(x, y), self.o.device, self.o.clock)


def main(arguments: list[str] | None = None) -> None:
    o = settled(options().parse_args(arguments))
    started = time.monotonic()
    o.clock = time.process_time if o.cpu_time else time.perf_counter
    o.kept = o.kept and hand_back_freed_memory()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = o.tune  # for the peers, too
    settings: dict[str, Any] = {k: getattr(o, k) for k in ("model", "batch", "size", "steps", "tune")}
    settings["clock"] = "CUDA events" if o.device.type == "cuda" else "CPU time" if o.cpu_time else "wall time"
    settings["freed_memory_kept"] = "except for peers as used" if o.kept else o.kept
    bench = Bench(o, build_model(o.model, num_classes=10).to(o.device).eval())
    parts = [PLAIN, *bench.compiled]
    results = Results(o.json, o.device, COLUMNS, parts, **settings, beside={}, choices={}, fastest_peer={})
    o.choices = results.more["choices"]
    end = started + o.budget
    for part in results.fitting(results.unfinished, end):
        bench.run(part, results, end)
    if not results.rows:
        raise SystemExit("every contestant was skipped")
    for kind, found in results.more["fastest_peer"].items():
        print(f"fastest peer {kind}: {found['name']}, {found['slower']['median']:.2f}x the time of the first")


if __name__ == "__main__":
    main()
