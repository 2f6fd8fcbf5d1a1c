"""Fused ops of margin-weighted adversarial training, usable in any PyTorch code.

Each op has a plain PyTorch reference (every device), a native implementation (CPU) and a Triton one (CUDA);
`implementation(name, device)` tells which one runs, `force_reference()` or MWPB_IMPL=reference forces the first.
"""

from __future__ import annotations

from mwpb_kernels.margin import deviation_radius, margin, margin_radius
from mwpb_kernels.op import OPS, force_reference, implementation, load_native
from mwpb_kernels.philox import derive_seed, philox_words

native_library = load_native()

__all__ = [
    "OPS",
    "derive_seed",
    "deviation_radius",
    "force_reference",
    "implementation",
    "margin",
    "margin_radius",
    "native_library",
    "philox_words",
]
