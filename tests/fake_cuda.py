"""Fake CUDA tensors in a CPU build of PyTorch: whole steps run on them, without values, and are counted.

For processes of their own, as it changes PyTorch for good: they load `library()` before they import PyTorch, and
call `claim()`. Within `MODE` tensors on "cuda" have shapes, types and strides. What compares values cannot run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fake_recorder import gives_views, writes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mwpb_fast.engine.recorder import tensors

SOURCE = Path(__file__).with_suffix(".cpp")
MODE = FakeTensorMode()
# no work on the device
FREE = ("prim::", "aten::empty", "aten::new_empty", "aten::lift_fresh", "aten::detach", "profiler::")
# Of a convolution, the operands that it must read, by name; with the first result they are its own traffic. The
# input is not read for its own gradient.
OWN = {
    "aten::convolution": ("input", "weight"),
    "aten::convolution_backward": ("grad_output", "weight"),
    "mwpb::conv_relu": ("x", "weight"),
    "mwpb::conv_input_grad": ("grad", "weight"),
    "mwpb::stem_conv": ("x", "weight"),
    "mwpb::stem_step_": ("grad", "weight"),
}
UNREAD = {"aten::convolution_backward": ("input",)}
BIAS_ADD = "cuDNN's own pass for the bias"


def library() -> Path:
    """What makes the device appear, compiled once a PyTorch. Raises FileNotFoundError without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("needs a C++ compiler")
    root = Path(torch.__file__).parent
    known = hashlib.sha256(SOURCE.read_bytes() + f"{root} {torch.__version__} {os.getuid()}".encode()).hexdigest()
    built = Path(tempfile.gettempdir()) / f"mwpb-fake-cuda-{known[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            new = Path(folder) / built.name
            command = [
                compiler,
                "-std=c++20",
                "-fPIC",
                "-shared",
                f"-I{root}/include",
                str(SOURCE),
                "-o",
                str(new),
            ]
            command += [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-ltorch_cpu", "-lc10"]
            subprocess.run(command, check=True)
            os.replace(new, built)
    return built


def claim() -> None:
    """What else of PyTorch has to believe that there is a device."""
    everything: Any = torch
    everything.autograd.set_multithreading_enabled(False)  # the engine's threads ask the device for more
    everything.cuda._lazy_init = lambda: None
    everything.cuda.is_bf16_supported = lambda including_emulation=True: True
    # what is on a stream of its own is counted like the rest
    everything.cuda.Stream = lambda device: SimpleNamespace(wait_stream=lambda other: None)
    everything.cuda.current_stream = everything.cuda.Stream
    everything.cuda.stream = contextlib.nullcontext
    everything.cuda.amp.common.amp_definitely_not_available = lambda: False


class Traffic(TorchDispatchMode):
    """Operations by name, and the bytes that they must read and write; views and allocations do not count.

    own: bytes of the convolutions' operands and results, which no fusion saves. besides: all others. Where a
    convolution has a bias, PyTorch adds it on CUDA in a pass of its own, which no dispatcher sees: it is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.own: Counter[str] = Counter()
        self.besides: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        if name == "aten::_fused_sgd_":  # it has no form without values, and returns nothing
            self.operations[name] += 1
            return None
        result = func(*args, **kwargs)
        if (gives_views(func) and not writes(func) and func._schema.returns) or name.startswith(FREE):
            return result
        self.operations[name] += 1
        for argument, given in zip(func._schema.arguments, args, strict=False):
            read = sum(map(size, tensors(given)))
            if argument.name in OWN.get(name, ()):
                self.own[name] += read
            elif argument.name not in UNREAD.get(name, ()):
                written = argument.alias_info is not None and argument.alias_info.is_write
                self.besides[name] += read * (2 if written else 1)
        if not writes(func):
            made = [size(t) for t in tensors(result if isinstance(result, tuple | list) else [result])]
            self.own[name] += made[0] if name in OWN else 0
            self.besides[name] += sum(made[1:] if name in OWN else made)
        if name == "aten::convolution" and args[2] is not None:
            self.operations[BIAS_ADD] += 1
            self.besides[BIAS_ADD] += 2 * size(result)
        return result

    def less(self, other: Traffic) -> Traffic:
        """This without that."""
        found = Traffic()
        for name in ("operations", "own", "besides"):
            difference = Counter(getattr(self, name))
            difference.subtract(getattr(other, name))
            setattr(found, name, Counter({k: n for k, n in difference.items() if n}))
        return found


def size(t: torch.Tensor) -> int:
    """Bytes of the elements that differ in place."""
    elements = 1
    for n, stride in zip(t.shape, t.stride(), strict=True):
        elements *= 1 if stride == 0 else n
    return elements * t.element_size()
