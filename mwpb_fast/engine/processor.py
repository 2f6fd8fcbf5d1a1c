"""What oneDNN, PyTorch's library of convolutions on the CPU, may use of this processor.

It takes what the processor has, unless the user's ONEDNN_MAX_CPU_ISA holds it to less.
"""

from __future__ import annotations

import os
import platform

import torch

# These values of ONEDNN_MAX_CPU_ISA leave AVX2 out, AVX-512 out, and bfloat16 alone out. oneDNN takes a value that
# it does not know for "all".
BELOW_AVX2 = {"SSE41", "AVX"}
BELOW_AVX512 = BELOW_AVX2 | {"AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}
BELOW_BF16 = BELOW_AVX512 | {"AVX512_CORE", "AVX512_CORE_VNNI"}


def limit() -> str:
    """The user's limit in capitals, "" for none."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


def cpu_has_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 in hardware here; elsewhere it emulates that, many times slower."""
    if limit() in BELOW_BF16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def vector_floats() -> int:
    """The most float32 numbers of a vector that oneDNN may use here: 16, 8 or 0 where it does not use any."""
    if not torch.backends.mkldnn.is_available():
        return 0
    if platform.machine() not in ("x86_64", "AMD64", "i386"):
        return 16  # It has code for SVE of up to 512 bits.
    if torch.cpu._is_avx512_supported() and limit() not in BELOW_AVX512:
        return 16
    return 8 if torch.cpu._is_avx2_supported() and limit() not in BELOW_AVX2 else 0
