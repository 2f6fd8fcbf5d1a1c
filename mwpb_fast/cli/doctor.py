"""What this machine has for the work: devices, the implementation of each op, packages, and what is missing.

Each missing piece says what it costs and which extra brings it. Nothing here fails a run.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mwpb_fast.system import text_tables
from mwpb_fast.system.files import to_json
from mwpb_fast.system.optional import Attempt, attempt, version_of
from mwpb_fast.system.units import counted

OK, MISSING, OPTIONAL, BROKEN, NOTE = "ok", "missing", "optional", "broken", "note"
SLOW = "CPU ops run as plain PyTorch, several times slower; mend that, then "
AGAIN = "install the checkout anew, as the README says: pip install --no-build-isolation ./kernels"


@dataclass(frozen=True)
class Finding:
    """One line of the report. status: ok, missing, optional (not there, and wanted for one purpose alone), broken
    (there, and of no use) or note. cost: what goes without it, how to get it."""

    name: str
    status: str
    detail: str
    cost: str = ""


def findings() -> list[Finding]:
    """Everything that is looked at, in the order of the report."""
    return [*machine(), *kernels(), *choices(), *packages()]


def report(as_json: bool = False) -> str:
    """The report as text for a terminal, or as JSON with the implementation of each op."""
    found, ops = findings(), implementations()
    if as_json:
        return to_json({"findings": [asdict(finding) for finding in found], "ops": ops}, indent=1)
    width = max(len(finding.name) for finding in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.status:8s}  {finding.name:{width}s}  {finding.detail}".rstrip())
        if finding.cost:
            lines.append(f"{'':10s}{'':{width}s}  {finding.cost}")
    return "\n".join([*lines, "", *_of_ops(ops)])


def _of_ops(ops: dict[str, dict[str, str]]) -> list[str]:
    """What runs most of the ops, in a line, and a table of those that something else runs."""
    usual = Counter((on["cpu"], on["cuda"]) for on in ops.values()).most_common(1)[0][0]
    others = [[op, on["cpu"], on["cuda"]] for op, on in ops.items() if (on["cpu"], on["cuda"]) != usual]
    which = f"{len(ops) - len(others)} of {len(ops)}" if others else f"all {len(ops)}"
    line = f"ops: {which} are {usual[0]} on the CPU and {usual[1]} on CUDA"
    if not others:
        return [line]
    return [f"{line}, the others (reference is plain PyTorch):", *text_tables.plain(["op", "cpu", "cuda"], others)]


def implementations() -> dict[str, dict[str, str]]:
    """The implementation of each op on the CPU, and the one that a CUDA device gets or would get."""
    import mwpb_kernels as ops

    return {op: {device: ops.implementation(op, device) for device in ("cpu", "cuda")} for op in sorted(ops.OPS)}


def machine() -> Iterator[Finding]:
    """Interpreter, PyTorch, devices, precision, disk."""
    import torch

    from mwpb_fast.engine.processor import cpu_has_bf16, vector_floats
    from mwpb_fast.runs.log import cpu_name
    from mwpb_fast.system import threads

    yield Finding("python", OK, platform.python_version())
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", OK, f"{torch.__version__} ({build})")
    level = torch.backends.cpu.get_cpu_capability()
    yield Finding("cpu", OK, f"{cpu_name()}, {torch.get_num_threads()} threads, {level}")
    yield Finding("openmp", OK, threads.chosen())
    if cpu_has_bf16():
        yield Finding("cpu bf16", OK, "in hardware; --precision.dtype bf16 uses it")
    else:
        yield Finding("cpu bf16", NOTE, "not in this processor: training on the CPU is fp32")
    if channels := vector_floats():
        detail = f"weight gradients of 1x1 convolutions with stride and fewer than {channels} input channels"
        yield Finding(
            "cpu oneDNN",
            NOTE,
            detail,
            "it gets them wrong on this processor, so they are computed another way; there is nothing to do",
        )
    yield from _cuda()
    free = shutil.disk_usage(".").free
    yield Finding("disk", OK if free > 5e9 else NOTE, f"{free / 1e9:.0f} GB free in the current folder")


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        detail, status = "none that PyTorch sees", NOTE
        if torch.version.cuda is None:
            cost = "training runs on the CPU; for an NVIDIA GPU install a CUDA build of PyTorch"
            if os.path.exists("/proc/driver/nvidia/version"):
                detail, status = "an NVIDIA driver is loaded, but this PyTorch is built for the CPU only", MISSING
        else:
            status = MISSING
            cost = "training runs on the CPU; check the NVIDIA driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        yield Finding("cuda", status, detail, cost)
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

    folder = Path(ops.__file__).parent
    if ops.native_library:
        built = (folder / ops.native_library).stat().st_mtime
        newer = sorted(p.name for p in folder.parent.glob("csrc/*") if p.stat().st_mtime > built)
        detail = f"{ops.native_library}, older than {newer[0]}" if newer else ops.native_library
        yield Finding("native ops", NOTE if newer else OK, detail, AGAIN if newer else "")
    else:
        there = any(folder.glob("libmwpb_*.so"))
        yield Finding("native ops", BROKEN if there else MISSING, ops.native_problem, SLOW + AGAIN)
    if not ops.triton_problem:
        yield Finding("triton", OK, version_of("triton") or "version unknown")
    else:
        cost = "ops on CUDA run as plain PyTorch; CUDA builds of PyTorch for Linux bring it"
        broken, wanted = "import" in ops.triton_problem, torch.cuda.is_available()
        status = BROKEN if broken else MISSING if wanted else NOTE
        yield Finding("triton", status, ops.triton_problem.removeprefix("Triton "), cost)
    if forced := os.environ.get("MWPB_IMPL"):
        yield Finding("MWPB_IMPL", NOTE, forced, "every op runs as plain PyTorch until this variable is unset")


def choices() -> Iterator[Finding]:
    """The engines that runs have chosen here, which the next ones like them take without a trial."""
    from mwpb_fast.choice import cache

    kept = list(cache.kept())
    yield Finding("engine cache", OK, f"{counted(len(kept), 'choice')} in {cache.folder()}")
    for record in kept[:3]:
        about = record.circumstances
        model, size = about.get("model", {}).get("name"), about.get("images")
        yield Finding("engine", OK, f"{record.chosen} for {model} on batches {size}, {about.get('device')}")


def packages() -> Iterator[Finding]:
    """What the extras bring, and of what comes with mwpb-fast the packages that some runs can do without."""
    yield _dali()
    yield _package("pyautoattack", "no AutoAttack (attack aa)", "eval")
    yield _package("matplotlib", "no learning curves and radius histograms", "plots")
    yield _package("onnx", "no export --format onnx", "export")
    yield _package("shtab", "no mwpb-fast completion", "completion")
    yield _package("huggingface_hub", "no export --push-to-hub", "hub")
    yield _package("tensorboard", "metrics go to metrics.jsonl only", also="torch.utils.tensorboard.writer")
    yield _package("scikit-learn", "no data set digits", module="sklearn.datasets")
    yield _package("scipy", "no preparation of SVHN", module="scipy.io")
    yield _package("pillow", "no preparation of sets that are image files", module="PIL.Image")
    yield _cudnn()
    yield _apex()


def _package(name: str, cost: str, extra: str = "", *, module: str = "", also: str = "") -> Finding:
    found = attempt(*filter(None, (module or name, also)))
    if found.module is not None:
        return Finding(name, OK, version_of(name) or "version unknown")
    return _useless(
        name, found, f"{cost}; {found.cure(name, extra)}", version_of(name), OPTIONAL if extra else MISSING
    )


def _useless(name: str, found: Attempt, cost: str, number: str | None, absent: str = OPTIONAL) -> Finding:
    """Not there, of which `absent` is the status, or broken: then with the version, and what it raised."""
    if found.broken:
        return Finding(name, BROKEN, f"{number or ''} {found.why}".strip(), cost)
    return Finding(name, absent, found.why.removeprefix("is "), cost)


def _dali() -> Finding:
    import torch

    major = (torch.version.cuda or "13").split(".")[0]
    extra = "dali-cuda12" if major == "12" else "dali"
    wanted = f"nvidia-dali-cuda{major}0"
    installed = [name for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if version_of(name)]
    found = attempt("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types")
    name = installed[0] if installed else "nvidia-dali"
    if found.module is None:
        get = found.cure(name if installed else wanted, extra)
        cost = f"--data.loader dali is not there, the resident loader is; {get}"
        return _useless("dali", found, cost, version_of(name))
    detail = f"{version_of(name) or 'version unknown'} ({name})"
    if torch.version.cuda and installed and wanted not in installed:
        get = f"pip install 'mwpb-fast[{extra}]'"
        return Finding("dali", NOTE, detail, f"for another CUDA than this PyTorch's {torch.version.cuda}; {get}")
    return Finding("dali", OK, detail)


def _cudnn() -> Finding:
    name, found = "nvidia-cudnn-frontend", attempt("cudnn")
    cost = "not needed: no engine takes cuDNN's own graphs; to try them: "
    if found.module is None:
        return _useless("cudnn", found, cost + found.cure(name, "cudnn"), version_of(name))
    number = version_of(name) or "version unknown"
    try:  # it imports without the library that it fronts for
        return Finding("cudnn", OK, f"{number} ({name}), of cuDNN {found.module.backend_version()}")
    except Exception as error:  # also of another package of that name
        reason = " ".join(str(error).split()) or type(error).__name__
        cost += "install a CUDA build of PyTorch, which brings the library"
        return Finding("cudnn", BROKEN, f"{number} finds no cuDNN ({reason})", cost)


def _apex() -> Finding:
    from mwpb_fast.optim import find_apex

    found, cure = find_apex()
    if found.module is not None:
        return Finding("apex", OK, "NVIDIA's; --optim.fused apex uses its FusedSGD")
    detail = found.why.removeprefix("NVIDIA apex ").removeprefix("is ")
    cost = f"not needed: PyTorch's own fused SGD is the default; for apex's, {cure}"
    return Finding("apex", BROKEN if found.broken else OPTIONAL, detail, cost)
