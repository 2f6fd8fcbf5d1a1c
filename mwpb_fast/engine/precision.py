"""Device, number type and memory layout of a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mwpb_kernels as ops
import torch

from mwpb_fast.config import ConfigError, PrecisionConfig
from mwpb_fast.engine.processor import BELOW_BF16, cpu_has_bf16, limit
from mwpb_fast.system import ranks

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """device; dtype of convolutions and matrix products (float32 is all of it, no TF32); layout of images and
    weights; oracle mode; dtype of the attack alone, None for the same; whether cuDNN chooses its algorithms by
    measurement."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    oracle: bool
    attack_dtype: torch.dtype | None = None
    benchmark: bool = False

    @property
    def attack(self) -> Precision:
        """The attack's precision."""
        return dataclasses.replace(self, dtype=self.attack_dtype or self.dtype, attack_dtype=None)

    @property
    def mixed(self) -> bool:
        """Whether autocast is on."""
        return self.dtype != torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for forward passes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.mixed)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling: on for fp16, whose range is short, off otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """What is needed around a run: full float32 where training or attack is in it, cuDNN's choice of
        algorithms, and for the oracle reference ops and deterministic algorithms."""
        with contextlib.ExitStack() as stack:
            if torch.float32 in (self.dtype, self.attack.dtype):
                stack.enter_context(full_float32())
            if self.benchmark:
                stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
                torch.backends.cudnn.benchmark = True
            if self.oracle:
                before = torch.are_deterministic_algorithms_enabled()
                warn = torch.is_deterministic_algorithms_warn_only_enabled()
                stack.callback(torch.use_deterministic_algorithms, before, warn_only=warn)
                torch.use_deterministic_algorithms(True, warn_only=True)
                stack.enter_context(ops.force_reference())
            yield


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Inside the block cuDNN chooses its algorithms by rule. By measurement each new size of a batch costs
    seconds, which those that are met once do not earn back."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Inside the block float32 convolutions and products are not rounded to TF32 or bfloat16 within.

    PyTorch's older switches are set with the newer ones: it raises where one is read that does not agree.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    places = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.conv, mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    products = _older(torch.get_float32_matmul_precision, "highest")
    convolutions = _older(lambda: cudnn.allow_tf32, True)
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


@contextlib.contextmanager
def tf32_convolutions() -> Iterator[None]:
    """Inside the block, which may be one of `full_float32`, cuDNN's float32 convolutions are rounded to TF32
    within, as they are by PyTorch's default; matrix products are not."""
    cudnn: Any = torch.backends.cudnn
    places = (cudnn.conv, cudnn.rnn)
    before, older = [place.fp32_precision for place in places], _older(lambda: cudnn.allow_tf32, True)
    cudnn.allow_tf32 = True
    for place in places:
        place.fp32_precision = "tf32"
    try:
        yield
    finally:
        cudnn.allow_tf32 = older
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def _older(read: Callable[[], Any], default: Any) -> Any:
    """The setting, or PyTorch's default where it already disagrees with the newer one and cannot be read."""
    try:
        return read()
    except RuntimeError:
        return default


def make_precision(config: PrecisionConfig) -> Precision:
    """The precision that `config` asks for on this machine. Raises ConfigError for what it cannot do.

    A CUDA device that has a number becomes the current one.
    """
    device = _device(config.device)
    name = config.dtype
    if name == "auto":
        name = "bf16" if device.type == "cuda" and not config.oracle else "fp32"
    attack = name if config.attack_dtype == "auto" else config.attack_dtype
    check_dtype("dtype", name, device)
    check_dtype("attack_dtype", attack, device)
    channels_last = config.channels_last and not config.oracle
    return Precision(
        device=device,
        dtype=_DTYPES[name],
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        oracle=config.oracle,
        attack_dtype=_DTYPES[attack],
        benchmark=config.tune and device.type == "cuda" and not config.oracle,
    )


def check_dtype(option: str, name: str, device: torch.device) -> None:
    """Refuse a number type that the device does not compute in. Raises ConfigError, which names the option."""
    if name == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision.{option} fp16 needs a CUDA device; on the CPU take fp32 or bf16")
    if name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        why = f"ONEDNN_MAX_CPU_ISA={limit()} rules both out" if limit() in BELOW_BF16 else "this one has neither"
        raise ConfigError(f"precision.{option} bf16 needs a CPU with AVX-512 BF16 or AMX; {why}")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        instead = "fp16" if option == "dtype" else "fp32"
        raise ConfigError(
            f"precision.{option} bf16 needs an NVIDIA GPU of the Ampere generation or later; take {instead}"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if ranks.local() is None:
            return torch.device(name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"precision.device {name!r} is not a device: write auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"precision.device {name!r} is not supported: write auto, cpu, cuda or cuda:0")
    if device.index is not None and device.type == "cuda" and ranks.count() > 1:
        raise ConfigError(f"precision.device {name} is one device for {ranks.count()} processes: take cuda")
    if device.index is None and device.type == "cuda" and ranks.local() is not None:
        device = torch.device("cuda", ranks.local())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"precision.device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for what works on the current one, such as libraries' own buffers
    return device
