"""Device, number type and memory layout of a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mwpb_kernels as ops
import torch

from mwpb_fast.config import ConfigError, PrecisionConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """device; dtype of convolutions and matrix products; layout of images and weights; oracle mode; dtype of the
    attack alone, None for the same."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    oracle: bool
    attack_dtype: torch.dtype | None = None

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
        """What the oracle needs around a run: reference ops and deterministic algorithms."""
        if not self.oracle:
            yield
            return
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with ops.force_reference():
                yield
        finally:
            torch.use_deterministic_algorithms(before)


def make_precision(config: PrecisionConfig) -> Precision:
    """The precision that `config` asks for on this machine. Raises ConfigError for what it cannot do."""
    device = _device(config.device)
    name = config.dtype
    if name == "auto":
        name = "bf16" if device.type == "cuda" and not config.oracle else "fp32"
    attack = name if config.attack_dtype == "auto" else config.attack_dtype
    _check_dtype("dtype", name, device)
    _check_dtype("attack_dtype", attack, device)
    channels_last = config.channels_last and not config.oracle
    return Precision(
        device=device,
        dtype=_DTYPES[name],
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        oracle=config.oracle,
        attack_dtype=_DTYPES[attack],
    )


def _check_dtype(option: str, name: str, device: torch.device) -> None:
    if name == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision.{option} fp16 needs a CUDA device; on the CPU take fp32 or bf16")
    if name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise ConfigError(f"precision.{option} bf16 needs a CPU with AVX-512 BF16 or AMX; this one has neither")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        instead = "fp16" if option == "dtype" else "fp32"
        raise ConfigError(
            f"precision.{option} bf16 needs an NVIDIA GPU of the Ampere generation or later; take {instead}"
        )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"precision.device {name!r} is not a device: write auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"precision.device {name!r} is not supported: write auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"precision.device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device
