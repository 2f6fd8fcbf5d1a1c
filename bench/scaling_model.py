"""How long a step of adversarial training takes on many devices: a small simulator, without torch.

A step is computed by every rank on its own images: the attack's passes, which nobody communicates, then the
training pass, whose gradients are summed over the ranks bucket by bucket while the backward pass goes on. What is
left when that pass has ended, and the wait for the slowest rank, is what many devices cost. All times are in
seconds, volumes in bytes, rates per second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does. flop: of one forward pass of one image. attack_steps: each a forward pass and an input
    gradient. other_forwards: such as the margin's. kernels: that a forward pass launches, a backward one twice as
    many. parameters: whose gradients are summed, in `gradient_bytes` each."""

    flop: float
    parameters: int
    attack_steps: int
    other_forwards: int = 1
    kernels: int = 0
    gradient_bytes: int = 4

    def passes(self) -> tuple[float, float]:
        """Forward passes that the work before the training's backward pass amounts to, and that pass itself."""
        return self.other_forwards + 2 * self.attack_steps + 1, 2.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What it is done on. flops: that a device attains. launch: the least time of a kernel. per_node: devices that
    share the fast link. link, network: that one device sends over the fast link and between nodes. link_delay,
    network_delay: of one message. jitter: standard deviation of a rank's time, as a share of it."""

    flops: float
    per_node: int
    link: float
    network: float
    link_delay: float = 0.0
    network_delay: float = 0.0
    launch: float = 0.0
    jitter: float = 0.0
    bucket: float = 25e6


@dataclass(frozen=True, kw_only=True)
class Step:
    """Of `ranks` ranks with `batch` images each. compute: of one rank alone. exposed: communication that no
    computation hides. waiting: for the slowest rank."""

    ranks: int
    batch: int
    compute: float
    communication: float
    exposed: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.waiting

    @property
    def images_per_second(self) -> float:
        return self.ranks * self.batch / self.seconds


def ring(volume: float, ranks: int, rate: float, delay: float) -> float:
    """An all-reduce around a ring: every rank sends the volume nearly twice, in 2 (ranks - 1) messages."""
    return 2 * (ranks - 1) * (volume / ranks / rate + delay) if ranks > 1 else 0.0


def tree(volume: float, ranks: int, rate: float, delay: float) -> float:
    """An all-reduce up and down two trees of half the volume each: the same traffic at full rate, in messages
    whose number grows as the logarithm of the ranks."""
    return 2 * (volume / rate + math.ceil(math.log2(ranks)) * delay) if ranks > 1 else 0.0


def all_reduce(volume: float, ranks: int, machine: Machine) -> float:
    """Within the nodes each device comes to have a share of the sum, between nodes those with the same share sum
    it by the better of ring and tree, and within the nodes all get all shares."""
    near = min(ranks, machine.per_node)
    nodes = math.ceil(ranks / machine.per_node)
    share = volume / near
    far = min(
        ring(share, nodes, machine.network, machine.network_delay),
        tree(share, nodes, machine.network, machine.network_delay),
    )
    return ring(volume, near, machine.link, machine.link_delay) + far


def computing(work: Work, machine: Machine, batch: int, passes: float) -> float:
    """So many forward passes' worth of work: by their arithmetic, or by their launches where those take longer."""
    return passes * max(batch * work.flop / machine.flops, work.kernels * machine.launch)


def slowest(ranks: int, seconds: float, machine: Machine) -> float:
    """How much longer than the mean the slowest of the ranks takes, whose times are normally distributed; Blom's
    approximation of the largest of so many."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) * machine.jitter * seconds if ranks > 1 else 0.0


def simulate(work: Work, machine: Machine, ranks: int, batch: int) -> Step:
    """One step: buckets become ready evenly over the backward pass, and the network takes one after the other."""
    before, backward = (computing(work, machine, batch, passes) for passes in work.passes())
    volume = float(work.parameters * work.gradient_bytes)
    buckets = max(1, math.ceil(volume / machine.bucket))
    each = all_reduce(volume / buckets, ranks, machine)
    free = 0.0
    for ready in (before + backward * (i + 1) / buckets for i in range(buckets)):
        free = max(free, ready) + each
    compute = before + backward
    return Step(
        ranks=ranks,
        batch=batch,
        compute=compute,
        communication=buckets * each,
        exposed=free - compute,
        waiting=slowest(ranks, compute, machine),
    )
