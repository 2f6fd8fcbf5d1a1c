"""Kernels compiled as real launches specialise them, for sm_90: registers, spills, widths of loads and stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import OPS

pytest.importorskip("triton")
# Kernels that store sums alone, a number a channel; and those that add these up.
SUMMING = ("_batch_moments_kernel", "_gradient_sums_kernel")
ADDING_UP = ("_batch_statistics_kernel", "_gradient_totals_kernel")
SCRIPT = Path(__file__).with_name("launches.py")


def launched(what: str, cache: Path) -> list[dict[str, Any]]:
    """What the script reports, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, str(SCRIPT), what]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_of_a_training_step_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Where addresses and channels allow it; and run all the same where they do not."""
    found = launched("training", tmp_path)
    assert {r["op"] for r in found} == {
        "batch_norm_relu",
        "batch_norm_relu_backward",
        "bias_add_relu_",
        "conv_input_grad",
        "conv_relu",
        "gated_sum",
        "linf_step_",
        "scale_bias_relu",
        "stem_conv",
        "stem_step_",
    }
    for r in found:
        assert r["spilled"] == 0, r
        most = 168 if r["op"].startswith(("conv", "stem")) else 96 if r["op"].startswith("batch_norm") else 64
        assert r["registers"] <= most, r
        assert bool(r["MMA"]) == r["op"].startswith(("conv", "stem")), r
        if "off" not in r["what"] and r["kernel"] not in ADDING_UP:
            # not an image of three channels, which stem_conv reads and stem_step_ writes
            assert r.get("LD128") or r["op"] == "stem_conv", r
            assert r.get("ST128") or r["kernel"] in SUMMING or r["op"] == "stem_step_", r


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_sample_of_every_op_can_be_launched(tmp_path: Path) -> None:
    found = launched("all", tmp_path)
    assert {r["op"] for r in found} == set(OPS)
    assert not [r for r in found if r["spilled"]]
