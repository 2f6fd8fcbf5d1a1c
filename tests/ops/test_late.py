"""Triton is imported when it is first needed, and kernels written before and after that are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mwpb_kernels
import pytest
from mwpb_kernels.late import HAS_TRITON

PACKAGE = Path(mwpb_kernels.__file__).parent
OWN = """
import torch
from mwpb_kernels.op import tl, triton

@triton.jit
def plus(x, NUMBER: tl.constexpr):  # without postponed annotations: the stand-in's is seen
    return x + NUMBER

@triton.jit
def own_kernel(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, plus(tl.load(x_ptr + at, mask=at < n), 2), mask=at < n)

def call(x):
    own_kernel[(triton.cdiv(x.numel(), 8),)](x_ptr=x, n=x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return x.tolist()
"""
USE = """
import sys, torch, mwpb_kernels
import before
there = ['triton' in sys.modules]
if FIRST == 'own':
    assert before.call(torch.zeros(3)) == [2, 2, 2]
op = mwpb_kernels.OPS['margin']
for sample in op.samples(torch.device('cpu')):
    torch.testing.assert_close(op.on_cuda(*sample), op.reference(*sample), equal_nan=True, check_dtype=False)
there.append('triton' in sys.modules)
import after
for own in (before, after):
    assert own.call(torch.zeros(3)) == [2, 2, 2]
    assert type(own.plus).__module__.startswith('triton.') and own.tl is sys.modules['triton.language']
print(there, repr(mwpb_kernels.triton_problem))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton on this platform")
@pytest.mark.parametrize("first", ["own", "op"])
def test_kernels_before_and_after_the_import_of_triton(first: str, tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / f"{name}.py").write_text(OWN)
    path = os.pathsep.join([str(PACKAGE.parent), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", f"FIRST = {first!r}\n{USE}"],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[False, True] ''"]
