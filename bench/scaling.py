"""What many devices make of adversarial training: a model of ImageNet's, and its simulator against measured ranks.

    python bench/scaling.py --json bench/results/scaling.json
    python bench/scaling.py --measure --json bench/results/scaling-gloo-cpu.json

The first simulates (scaling_model.py) PGD-3 training of ResNet-50 at 224 pixels on 8 to 1,024 GPUs; nothing of it
was measured. What it supposes stands in IMAGENET and H100, each figure with where it is from. The second trains a
small network on random images with 1, 2 and 4 processes of one thread each, summing gradients by gloo, beside what
the simulator says of them: its computing time is that of one process, its link what an all-reduce alone measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import write_results
from scaling_model import Machine, Step, Work, simulate
from torch import distributed, multiprocessing, nn

from mwpb_fast.models import build_model

# 4.1 G multiply-adds; convolutions, batch norms and ReLUs as separate kernels
IMAGENET = Work(flop=8.2e9, parameters=25_557_032, attack_steps=3, kernels=175)
# 17.5 % of 989 TFLOP/s is what MLPerf v3.1's ResNet-50 attains on eight H100; 450 GB/s a direction is NVLink 4's,
# 50 GB/s one 400 Gb/s port a GPU; 3 us a kernel replayed from a graph; delays as NCCL's tuning has them, in round
# figures; 2 % is a supposition about how evenly the ranks run.
H100 = Machine(
    flops=0.175 * 989e12,
    per_node=8,
    link=450e9,
    network=50e9,
    link_delay=2e-6,
    network_delay=10e-6,
    launch=3e-6,
    jitter=0.02,
)
SLOW = dataclasses.replace(H100, network=1.25e9, network_delay=50e-6)  # 10 Gb/s Ethernet a GPU
CASES = (
    ("64 images a GPU", H100, 64, (1, 8, 64, 256, 1024)),
    ("4,096 images in all", H100, 0, (64, 256, 1024, 4096)),
    ("64 images a GPU, 10 Gb/s Ethernet", SLOW, 64, (8, 64, 1024)),
)
GLOBAL = 4096
MODELLED = (
    ("case", "batch", ""),
    ("ranks", "GPUs", ",d"),
    ("batch", "images a GPU", "d"),
    ("compute", "ms of computing", ".1f"),
    ("communication", "ms of all-reduce", ".2f"),
    ("exposed", "of these not hidden", ".2f"),
    ("waiting", "ms for the slowest", ".2f"),
    ("images_per_second", "images/s", ",.0f"),
    ("efficiency", "efficiency", ".1%"),
)
MEASURED = (
    ("ranks", "processes", "d"),
    ("measured", "ms a step, measured", ".1f"),
    ("least", "least", ".1f"),
    ("most", "most", ".1f"),
    ("modelled", "modelled", ".1f"),
    ("computing", "of that computing", ".1f"),
    ("communication", "all-reduce", ".2f"),
    ("off", "modelled / measured", ".2f"),
)
RANKS, BATCH, STEPS, WARM_UP, ATTACK_STEPS, SIZE = (1, 2, 4), 8, 12, 3, 2, 16
SMALL, LARGE = 10_000, 10_000_000  # numbers in the all-reduces that delay and rate are found from


def row(case: str, step: Step, alone: float) -> dict[str, Any]:
    """Milliseconds; efficiency: images a second and device against the first case's single one."""
    each = step.images_per_second / step.ranks
    thousandths = {key: 1e3 * getattr(step, key) for key in ("compute", "communication", "exposed", "waiting")}
    return {
        "case": case,
        "ranks": step.ranks,
        "batch": step.batch,
        **thousandths,
        "images_per_second": step.images_per_second,
        "efficiency": each / alone,
    }


def modelled() -> list[dict[str, Any]]:
    alone = simulate(IMAGENET, H100, 1, 64).images_per_second
    return [
        row(case, simulate(IMAGENET, machine, ranks, batch or GLOBAL // ranks), alone)
        for case, machine, batch, counts in CASES
        for ranks in counts
    ]


# measured ------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each call, all ranks beginning together."""
    seconds = []
    for _ in range(WARM_UP + count):
        distributed.barrier()
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return seconds[WARM_UP:]


def training(model: nn.Module) -> Callable[[], None]:
    """A step of PGD training on random images, its gradients summed by DDP; the attack uses the model itself."""
    shared = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.rand(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))
    loss = nn.functional.cross_entropy

    def step() -> None:
        x_adv = x.clone()
        for _ in range(ATTACK_STEPS):
            leaf = x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(leaf), y), leaf)
            x_adv = (x_adv.detach() + 2 / 255 * gradient.sign()).clamp(0, 1)
        optimizer.zero_grad()
        loss(shared(x_adv), y).backward()
        optimizer.step()

    return step


def one_rank(rank: int, ranks: int, port: int, answers: Any) -> None:
    """A process of its own: steps, and all-reduces alone. The first rank sends what it saw."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    seen: dict[str, Any] = {"steps": timed(training(build_model("smallresnet-64", num_classes=10)), STEPS)}
    for name, size in (("small", SMALL), ("large", LARGE)):
        numbers = torch.zeros(size)
        seen[name] = statistics.median(timed(partial(distributed.all_reduce, numbers), STEPS))
    if rank == 0:
        answers.put(seen)
    distributed.barrier()
    distributed.destroy_process_group()


def measured(ranks: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    multiprocessing.spawn(one_rank, (ranks, port, answers), nprocs=ranks)
    return answers.get()


def beside(seen: dict[int, dict[str, Any]], parameters: int) -> list[dict[str, Any]]:
    """What was measured and what the simulator makes of one rank's time and of the all-reduces alone."""
    alone = statistics.median(seen[1]["steps"])
    cores = len(os.sched_getaffinity(0))
    rows = []
    for ranks, found in seen.items():
        link, delay = 1e30, 0.0
        if ranks > 1:
            # a ring's two unknowns, from two volumes of 4-byte numbers
            volumes, messages = (4.0 * SMALL, 4.0 * LARGE), 2 * (ranks - 1)
            link = messages / ranks * (volumes[1] - volumes[0]) / max(found["large"] - found["small"], 1e-9)
            delay = max(found["small"] / messages - volumes[0] / ranks / link, 0.0)
        # More ranks than cores share them; a rank's arithmetic is that much slower.
        work = Work(flop=1.0, parameters=parameters, attack_steps=ATTACK_STEPS, other_forwards=0)
        rate = BATCH * sum(work.passes()) / alone / max(1.0, ranks / cores)
        step = simulate(
            work, Machine(flops=rate, per_node=ranks, link=link, network=1.0, link_delay=delay), ranks, BATCH
        )
        median = statistics.median(found["steps"])
        rows.append(
            {
                "ranks": ranks,
                "measured": 1e3 * median,
                "least": 1e3 * min(found["steps"]),
                "most": 1e3 * max(found["steps"]),
                "modelled": 1e3 * step.seconds,
                "computing": 1e3 * step.compute,
                "communication": 1e3 * step.communication,
                "off": step.seconds / median,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--measure", action="store_true", help="1, 2 and 4 processes on this machine")
    given = parser.parse_args()
    columns: Any = MODELLED
    if given.measure:
        parameters = sum(p.numel() for p in build_model("smallresnet-64", num_classes=10).parameters())
        rows, columns = beside({ranks: measured(ranks) for ranks in RANKS}, parameters), MEASURED
    else:
        rows = modelled()
    for found in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()})
    if given.json:
        write_results(given.json, torch.device("cpu"), columns, rows)


if __name__ == "__main__":
    main()
