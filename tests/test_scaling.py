"""bench/scaling_model.py: what can be reckoned by hand, and what its parts are bounded by."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from scaling_model import Machine, Work, all_reduce, ring, simulate, slowest, tree

WORK = Work(flop=1e9, parameters=1_000_000, attack_steps=3)  # 10 forward passes' worth of work
MACHINE = Machine(flops=1e12, per_node=8, link=4e9, network=1e9)


def test_one_device_only_computes() -> None:
    step = simulate(WORK, MACHINE, 1, 100)
    assert step.seconds == pytest.approx(100 * 10 * 1e9 / 1e12)
    assert step.communication == step.exposed == step.waiting == 0.0


def test_a_ring_sends_nearly_twice_the_volume() -> None:
    assert ring(4e6, 4, 1e9, 0.0) == pytest.approx(2 * 3 / 4 * 4e6 / 1e9)
    assert ring(0.0, 5, 1e9, 1e-6) == pytest.approx(8e-6)


def test_a_tree_has_fewer_messages_and_more_traffic() -> None:
    assert tree(4e6, 1024, 1e9, 0.0) == pytest.approx(8e-3)
    assert tree(0.0, 1024, 1e9, 1e-6) == pytest.approx(20e-6)
    assert tree(0.0, 1, 1e9, 1e-6) == 0.0


def test_between_nodes_each_device_sends_its_share() -> None:
    near = 2 * 7 / 8 * 8e6 / 4e9
    far = 2 * 1 / 2 * 1e6 / 1e9
    assert all_reduce(8e6, 16, MACHINE) == pytest.approx(near + far)
    assert all_reduce(8e6, 8, MACHINE) == pytest.approx(near)


def test_only_the_last_bucket_is_exposed_where_the_link_keeps_up() -> None:
    machine = Machine(flops=1e12, per_node=8, link=4e9, network=1e9, bucket=1e6)
    step = simulate(WORK, machine, 8, 1000)
    assert step.communication == pytest.approx(4 * ring(1e6, 8, 4e9, 0.0))
    assert step.exposed == pytest.approx(ring(1e6, 8, 4e9, 0.0))


def test_what_the_backward_pass_cannot_hide_is_exposed() -> None:
    machine = Machine(flops=1e12, per_node=8, link=1e6, network=1e9, bucket=1e6)
    step = simulate(WORK, machine, 8, 1)
    backward = 2 * 1e9 / 1e12
    first_ready = backward / 4  # after which the link never rests
    assert step.exposed == pytest.approx(first_ready + step.communication - backward)


def test_launches_bound_small_batches() -> None:
    work = Work(flop=1e9, parameters=1, attack_steps=3, kernels=100)
    machine = Machine(flops=1e12, per_node=8, link=4e9, network=1e9, launch=1e-4)
    assert simulate(work, machine, 1, 1).seconds == pytest.approx(10 * 100 * 1e-4)
    assert simulate(work, machine, 1, 100).seconds == pytest.approx(10 * 0.1)


@pytest.mark.parametrize(("ranks", "deviations"), [(2, 0.564), (8, 1.424), (64, 2.344), (1024, 3.248)])
def test_the_slowest_of_many_is_the_normal_distribution_s(ranks: int, deviations: float) -> None:
    """The expected largest of n standard normal numbers; 1 / sqrt(pi) for two, the others by quadrature."""
    machine = Machine(flops=1e12, per_node=8, link=4e9, network=1e9, jitter=0.1)
    assert slowest(ranks, 2.0, machine) == pytest.approx(0.2 * deviations, rel=0.05)
    assert slowest(1, 2.0, machine) == 0.0
    assert math.isclose(1 / math.sqrt(math.pi), 0.564, abs_tol=1e-3)
