"""Random sizes, layouts and values through every op: native against reference, and Triton on a share of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import INTERPRETED, NAMES, OPS, RUNNERS, compare, describe, outcome, plain_copy
from draw import draw_case
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from mwpb_kernels.op import Op

SETTINGS = dict(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
DEFAULT_CASES, SLOW_CASES = 30, 10_000
# The interpreter is some fifty times slower than a native op, so it takes a share of the cases; a GPU takes all.
TRITON_EVERY = {DEFAULT_CASES: 3, SLOW_CASES: 50} if INTERPRETED else {DEFAULT_CASES: 1, SLOW_CASES: 1}


def check(op: Op, number: int, triton: bool) -> None:
    args = draw_case(op, torch.Generator().manual_seed(number))
    expected = outcome(op, plain_copy(args))
    for runner in ("native", "triton") if triton and "triton" in RUNNERS else ("native",):
        compare(op, outcome(op, args, runner), expected, f"case {number}, {runner}: {describe(args)}", args)


def fuzz(name: str, cases: int) -> None:
    count = 0

    @seed(0)
    @settings(max_examples=cases, **SETTINGS)
    @given(st.integers(0, 2**48))
    def run(number: int) -> None:
        nonlocal count
        count += 1
        check(OPS[name], number, triton=count % TRITON_EVERY[cases] == 0)

    run()
    assert count >= cases


@pytest.mark.parametrize("name", NAMES)
def test_fuzz(name: str) -> None:
    fuzz(name, DEFAULT_CASES)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.unpoisoned  # the poison triples the cost of small allocations, and the default run has it
@pytest.mark.parametrize("name", NAMES)
def test_fuzz_ten_thousand_cases(name: str, record_property: Callable[[str, object], None]) -> None:
    fuzz(name, SLOW_CASES)
    record_property("cases", SLOW_CASES)
