"""Fused ops of margin-weighted adversarial training, usable in any PyTorch code.

Each op has a plain PyTorch reference (every device), a native implementation (CPU) and a Triton one (CUDA);
`implementation(name, device)` tells which one runs, `force_reference()` or MWPB_IMPL=reference forces the first.
Where an op has to run as the reference, one line on stderr says why, once; MWPB_QUIET=1 hides it. `native_problem`
and `triton_problem` hold the causes, empty where there is none.

Under a transform of torch.func or forward-mode AD an op runs as its reference, so its derivatives are right;
one that gives constants, such as a radius or a step, then raises instead of a derivative of zero. That holds for
the functions of this package; torch.ops.mwpb are its insides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mwpb_kernels import op
from mwpb_kernels.augment import crop_flip
from mwpb_kernels.awp import awp_perturb_, awp_restore_
from mwpb_kernels.batch_norm_relu import batch_norm_relu
from mwpb_kernels.bias_add_relu import bias_add_relu_, gated_sum
from mwpb_kernels.boosted import boosted_ce
from mwpb_kernels.conv import conv_input_grad, conv_relu
from mwpb_kernels.crop import crop_flip_params
from mwpb_kernels.fold import fold_
from mwpb_kernels.l2 import l2_step_
from mwpb_kernels.l2_start import l2_start
from mwpb_kernels.linf import linf_step_
from mwpb_kernels.logit_grads import ce_grad, cw_grad, dlr_grad, kl_grad
from mwpb_kernels.losses import kl_div
from mwpb_kernels.margin import deviation_radius, margin, margin_radius, standardised_radius
from mwpb_kernels.native import load_native
from mwpb_kernels.op import OPS, force_reference, implementation, unsaid
from mwpb_kernels.philox import derive_seed, philox_words
from mwpb_kernels.scale_bias_relu import scale_bias_relu
from mwpb_kernels.start import gaussian_start, uniform_start
from mwpb_kernels.stem import stem_conv, stem_step_

native_library, native_problem = load_native()
if native_problem:
    unsaid["cpu"] = native_problem
if TYPE_CHECKING:
    triton_problem: str


def __getattr__(name: str) -> Any:
    if name == "triton_problem":  # who wants to know waits for Triton's import
        return op.triton_problem()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "OPS",
    "awp_perturb_",
    "awp_restore_",
    "batch_norm_relu",
    "bias_add_relu_",
    "boosted_ce",
    "ce_grad",
    "conv_input_grad",
    "conv_relu",
    "crop_flip",
    "crop_flip_params",
    "cw_grad",
    "derive_seed",
    "deviation_radius",
    "dlr_grad",
    "fold_",
    "force_reference",
    "gated_sum",
    "gaussian_start",
    "implementation",
    "kl_div",
    "kl_grad",
    "l2_start",
    "l2_step_",
    "linf_step_",
    "margin",
    "margin_radius",
    "native_library",
    "native_problem",
    "philox_words",
    "scale_bias_relu",
    "standardised_radius",
    "stem_conv",
    "stem_step_",
    "triton_problem",
    "uniform_start",
]
