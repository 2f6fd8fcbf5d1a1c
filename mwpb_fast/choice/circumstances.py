"""What a choice depends on: the machine, the versions, the code, and what a step is made of."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import mwpb_kernels
import torch

import mwpb_fast
from mwpb_fast.config import Config, to_dict
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.processor import limit
from mwpb_fast.runs.log import cpu_name, own_version
from mwpb_fast.system import ranks
from mwpb_fast.system.files import to_json
from mwpb_fast.system.optional import version_of

PARTS = ("model", "warmup", "budget", "attack", "objective", "perturbation", "precision", "attack_mode")


def circumstances(config: Config, precision: Precision, x: torch.Tensor, gathers: bool) -> dict[str, Any]:
    """As JSON gives it back. precision: the attack's. x: (B, C, H, W), a batch. gathers: whether a captured step
    gathers its images itself."""
    device, plain = precision.device, to_dict(config)
    on_cuda = device.type == "cuda"
    parts = {name: plain[name] for name in PARTS}
    parts["precision"] = {k: v for k, v in plain["precision"].items() if k not in ("device", "pin")}
    found = {
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "capability": list(torch.cuda.get_device_capability(device)) if on_cuda else _processor(),
        "driver": _driver() if on_cuda else "",
        "versions": {"torch": torch.__version__, "triton": version_of("triton"), "mwpb-fast": own_version()},
        "code": _code(),
        "images": list(x.shape),
        "dtype": str(precision.dtype).removeprefix("torch."),
        "eps": str(config.evaluation.eps),
        "ema": bool(config.optim.ema),
        "fused": config.optim.fused,
        "data": config.data.name,
        "gathers": gathers,
        **parts,
        **({"processes": ranks.launched()} if ranks.launched() > 1 else {}),
    }
    plain_types: dict[str, Any] = json.loads(to_json(found))
    return plain_types


def _processor() -> list[str]:
    return [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads", limit()]


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return f"CUDA {torch.version.cuda}"


@cache
def _code() -> str:
    """A digest of both packages: it stands for the commit also without git, and in a checkout with changes."""
    digest = hashlib.sha256()
    for package in (mwpb_fast, mwpb_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".so") and path.is_file():
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
