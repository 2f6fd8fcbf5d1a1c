"""Compiles what real launches would: run as a script, without TRITON_INTERPRET.

A launch makes a constant of an integer that is 1 and tells the compiler of integers and addresses that 16 divides;
here a driver without a device sees to the same. `python launches.py all` launches every sample of every op,
`python launches.py training` the operands of a training step at batch 128, some of them a step off. One JSON
object a kernel: op, kernel, what, registers, spilled, and how often the machine code loads and stores each width,
and multiplies matrices.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ahead_of_time import BIN, resources
from cases import CPU, OPS, samples, tensors, tree
from mwpb_kernels.op import has_float64
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCH = 90


class NoDevice(DriverBase):
    """What a launch asks before it compiles."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


compiled: dict[int, tuple[str, Any]] = {}


def watch() -> None:
    """From now on a launch compiles its kernel, and does nothing more."""
    driver.set_active(NoDevice())
    launch: Callable[..., Any] = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        compiled.setdefault(id(kernel), (self.fn.__name__, kernel))
        return kernel

    JITFunction.run = run


def widths(asm: dict[str, Any]) -> dict[str, int]:
    """How often the machine code loads (LD) and stores (ST) 8, 16, 32, 64 or 128 bits of global memory, and
    multiplies on tensor cores (MMA)."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        code = subprocess.run(
            [BIN / "cuobjdump", "-sass", cubin], check=True, capture_output=True, text=True
        ).stdout
    found: Counter[str] = Counter()
    for kind, rest in re.findall(r"\b(LDG|LDGSTS|STG)\.([\w.]+)", code):
        bits = re.search(r"\b(?:U|S)?(8|16|64|128)\b", rest)
        found[f"{kind[:2]}{bits[1] if bits else 32}"] += 1
    found["MMA"] = len(re.findall(r"\bHG?MMA\b", code))
    return dict(found)


def report(op: str, what: str, launch: Callable[[], Any]) -> None:
    before = set(compiled)
    launch()
    for key in set(compiled) - before:
        name, kernel = compiled[key]
        record = dict(op=op, kernel=name, what=what, **resources(kernel.asm, ARCH), **widths(kernel.asm))
        print(json.dumps(record), flush=True)


def all_samples() -> None:
    for name, op in sorted(OPS.items()):
        for number, args in enumerate(samples(op)):
            if all(t.numel() for t in tensors(args)) and not has_float64(args):
                report(name, f"sample {number}", lambda op=op, args=args: op.triton(*args))


def training() -> None:
    """The operands of ResNet-18's second layer and last stage, of its image, and of its logits."""

    def image(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    for shape in ((128, 64, 32, 32), (128, 512, 4, 4)):
        channels, x = shape[1], image(*shape)
        bias, weight = torch.empty(channels), image(channels, channels, 3, 3)
        gate = torch.empty(shape[0], *shape[2:], channels // 8, dtype=torch.uint8)
        cases = {
            "bias_add_relu_": (x, bias, image(*shape)),
            "gated_sum": (x, image(*shape), gate),
            "scale_bias_relu": (x, bias, bias),
            "conv_relu": (x, weight, bias, image(*shape), 1, 1),
            "conv_input_grad": (x, weight, image(*shape), gate, 1, 1, *shape[2:]),
            "batch_norm_relu": (x, bias, bias, bias, bias, image(*shape), 0.1, 1e-5),
            "batch_norm_relu_backward": (image(*shape), x, bias, bias, bias, gate, True),
        }
        for name, args in cases.items():
            report(name, f"{shape}", lambda n=name, a=args: OPS[n].triton(*a))
    pixels, radius = image(128, 3, 32, 32, dtype=torch.float32), torch.empty(128)
    args = (pixels, image(128, 3, 32, 32), torch.empty_like(pixels), radius, radius, 0.0, 1.0)
    report("linf_step_", "images", lambda: OPS["linf_step_"].triton(*args))

    def off(t: torch.Tensor) -> torch.Tensor:
        """The same one element further on, where 16 does not divide its address."""
        memory = torch.empty(t.numel() + 8, dtype=t.dtype)
        return memory.as_strided(t.shape, t.stride(), 1)

    report("linf_step_", "images, off", lambda: OPS["linf_step_"].triton(*tree(off, args)))
    x, weight = image(128, 64, 32, 32), image(64, 3, 3, 3, dtype=torch.float32)
    stem: dict[str, tuple[Any, ...]] = {
        "stem_conv": (pixels, weight, torch.empty(64), True, 1, 1, torch.bfloat16),
        "stem_step_": (pixels, x, weight, pixels, radius, radius, 1, 1, 0.0, 1.0),
    }
    for name, args in stem.items():
        report(name, "images", lambda n=name, a=args: OPS[n].triton(*a))
        moved, planes = tree(off, args), tree(lambda t: t.contiguous() if t.dim() == 4 else t, args)
        report(name, "off", lambda n=name, a=moved: OPS[n].triton(*a))
        report(name, "planes", lambda n=name, a=planes: OPS[n].triton(*a))
    args = tree(off, (x, torch.empty(64), torch.empty_like(x)))
    report("bias_add_relu_", "off", lambda: OPS["bias_add_relu_"].triton(*args))


if __name__ == "__main__":
    watch()
    {"all": all_samples, "training": training}[sys.argv[1]]()
