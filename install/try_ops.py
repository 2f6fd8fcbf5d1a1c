"""Whether the installed ops are whole: the library of a processor level loads, and does what the reference does.

ATEN_CPU_CAPABILITY (default, avx2 or avx512) is the level; one that this processor has not got says so and passes.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import mwpb_kernels as ops
import torch

asked = os.environ["ATEN_CPU_CAPABILITY"]
level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
about = f"mwpb_kernels, Python {sys.version.split()[0]}, torch {torch.__version__}, {asked}"
if level != asked:
    raise SystemExit(print(f"{about}: not on this processor"))
assert Path(ops.__file__).is_relative_to(sys.prefix), ops.__file__
assert not ops.native_problem, ops.native_problem
assert ops.native_library == f"libmwpb_{asked.replace('default', 'baseline')}.so", ops.native_library
tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
compared = 0
for name, op in ops.OPS.items():
    assert not op.native or ops.implementation(name) == "native", name
    for sample in op.samples(torch.device("cpu")):
        found = []
        for function in (op.dispatched, op.reference):
            arguments = copy.deepcopy(sample)
            result = function(*arguments)
            found.append(
                [*(result if isinstance(result, tuple) else [result]), *(arguments[i] for i in op.mutates)]
            )
        for ours, right in zip(*found, strict=True):
            for a, b in zip(
                *([x] if isinstance(x, torch.Tensor) else x or [] for x in (ours, right)), strict=True
            ):
                near = tolerance.get(b.dtype, 0)
                torch.testing.assert_close(a, b, rtol=near, atol=near, equal_nan=True)
                compared += 1
print(f"{about}: {ops.native_library}, {len(ops.OPS)} ops, {compared} results as the reference's")
