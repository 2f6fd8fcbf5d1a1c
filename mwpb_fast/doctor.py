"""What this machine has for the work: devices, the implementation of each op, packages, and what is missing.

Each missing piece says what it costs and which extra brings it. Nothing here fails a run.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

OK, MISSING, NOTE = "ok", "missing", "note"


@dataclass(frozen=True)
class Finding:
    """One line of the report. status: ok, missing or note. cost: what goes without it, how to get it."""

    name: str
    status: str
    detail: str
    cost: str = ""


def findings() -> list[Finding]:
    """Everything that is looked at, in the order of the report."""
    return [*machine(), *kernels(), *packages()]


def report(as_json: bool = False) -> str:
    """The report as text for a terminal, or as JSON with the implementation of each op."""
    found, ops = findings(), implementations()
    if as_json:
        return json.dumps({"findings": [asdict(finding) for finding in found], "ops": ops}, indent=1)
    from mwpb_fast.log import table

    width = max(len(finding.name) for finding in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.status:7s}  {finding.name:{width}s}  {finding.detail}".rstrip())
        if finding.cost:
            lines.append(f"{'':9s}{'':{width}s}  {finding.cost}")
    lines += ["", *table(["op", "cpu", "cuda"], [[op, on["cpu"], on["cuda"]] for op, on in ops.items()])]
    return "\n".join(lines)


def implementations() -> dict[str, dict[str, str]]:
    """The implementation of each op on the CPU, and the one that a CUDA device gets or would get."""
    import mwpb_kernels as ops

    return {op: {device: ops.implementation(op, device) for device in ("cpu", "cuda")} for op in sorted(ops.OPS)}


def machine() -> Iterator[Finding]:
    """Interpreter, PyTorch, devices, precision, disk."""
    import torch

    from mwpb_fast.engine.processor import cpu_has_bf16, vector_floats
    from mwpb_fast.log import cpu_name

    yield Finding("python", OK, platform.python_version())
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", OK, f"{torch.__version__} ({build})")
    level = torch.backends.cpu.get_cpu_capability()
    yield Finding("cpu", OK, f"{cpu_name()}, {torch.get_num_threads()} threads, {level}")
    if cpu_has_bf16():
        yield Finding("cpu bf16", OK, "in hardware; --precision.dtype bf16 uses it")
    else:
        yield Finding("cpu bf16", NOTE, "not in this processor: training on the CPU is fp32")
    if channels := vector_floats():
        detail = f"weight gradients of 1x1 convolutions with stride and fewer than {channels} input channels"
        yield Finding("cpu oneDNN", NOTE, detail, "it gets them wrong on this processor, so they take a detour")
    yield from _cuda()
    free = shutil.disk_usage(".").free
    yield Finding("disk", OK if free > 5e9 else NOTE, f"{free / 1e9:.0f} GB free in the current folder")


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        detail = "none that PyTorch sees"
        if torch.version.cuda is None:
            cost = "training runs on the CPU; for an NVIDIA GPU install a CUDA build of PyTorch"
            if os.path.exists("/proc/driver/nvidia/version"):
                detail = "an NVIDIA driver is loaded, but this PyTorch is built for the CPU only"
        else:
            cost = "training runs on the CPU; check the NVIDIA driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        yield Finding("cuda", MISSING, detail, cost)
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        yield Finding(f"cuda:{number}", OK, f"{about.name}, sm_{about.major}{about.minor}, {memory}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("cuda bf16", OK, "in hardware; the default precision on CUDA")
    else:
        yield Finding("cuda bf16", NOTE, "not in this GPU: take --precision.dtype fp16 or fp32")


def kernels() -> Iterator[Finding]:
    """The native library, Triton and the switch between implementations."""
    import mwpb_kernels as ops
    import torch

    if ops.native_library:
        yield Finding("native ops", OK, ops.native_library)
    else:
        cost = "CPU ops run as plain PyTorch, several times slower; install a C++ compiler and reinstall mwpb-fast"
        yield Finding("native ops", MISSING, "no library for this processor", cost)
    if number := _version("triton"):
        yield Finding("triton", OK, number)
    else:
        cost = "ops on CUDA run as plain PyTorch; CUDA builds of PyTorch for Linux bring it"
        yield Finding("triton", MISSING if torch.cuda.is_available() else NOTE, "not installed", cost)
    if forced := os.environ.get("MWPB_IMPL"):
        yield Finding("MWPB_IMPL", NOTE, forced, "every op runs as plain PyTorch until this variable is unset")


def packages() -> Iterator[Finding]:
    """What the extras bring."""
    yield _dali()
    yield _package("pyautoattack", "no AutoAttack (attack aa)", "eval")
    yield _package("matplotlib", "no learning curves and radius histograms", "plots")
    yield _package("tensorboard", "metrics go to metrics.jsonl only; it comes with mwpb-fast: reinstall", "")
    yield _apex()


def _package(name: str, cost: str, extra: str) -> Finding:
    number = _version(name)
    if number and _imports(name):
        return Finding(name, OK, number)
    get = f"; pip install 'mwpb-fast[{extra}]'" if extra else ""
    return Finding(name, MISSING, f"{number} does not import" if number else "not installed", cost + get)


def _dali() -> Finding:
    import torch

    major = (torch.version.cuda or "13").split(".")[0]
    extra = "dali-cuda12" if major == "12" else "dali"
    wanted = f"nvidia-dali-cuda{major}0"
    installed = [name for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if _version(name)]
    get = f"pip install 'mwpb-fast[{extra}]'"
    if not installed or not _imports("nvidia.dali"):
        cost = f"--data.loader dali is not there, the resident loader is; {get}"
        return Finding("dali", MISSING, f"{installed[0]} does not import" if installed else "not installed", cost)
    detail = f"{_version(installed[0])} ({installed[0]})"
    if torch.version.cuda and wanted not in installed:
        return Finding("dali", NOTE, detail, f"for another CUDA than this PyTorch's {torch.version.cuda}; {get}")
    return Finding("dali", OK, detail)


def _apex() -> Finding:
    if find_spec("apex") is None:
        return Finding("apex", NOTE, "not installed", "not needed: PyTorch's own fused SGD is the default")
    if _imports("apex.optimizers"):
        return Finding("apex", OK, "NVIDIA's; --optim.fused apex uses its FusedSGD")
    cost = "not needed; the package of that name on the package index is a Pyramid toolkit: pip uninstall apex"
    return Finding("apex", NOTE, "an `apex` that is not NVIDIA's", cost)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _imports(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception:  # a package that is there and broken may raise anything
        return None
