"""A way around a fault of oneDNN's that writes over other memory: wrong weight gradients, crashes, hangs.

The weight gradient of a 1x1 convolution with a stride is computed from a copy of the positions that it reads. In
channels-last layout the copy has room for as many numbers a position as there are channels, but its n-th position
is looked for at n times the length of a vector: 8 with AVX2, 16 with AVX-512. With fewer channels than that, the
copy is written past its end. Forward passes and input gradients are right, and so is what has padding or groups.
oneDNN 3.12 (PyTorch 2.13) has the fault, as versions before and after it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from mwpb_fast.engine.processor import vector_floats
from mwpb_fast.engine.twin import EngineWarning


class _Detour:
    """PyTorch's convolution_backward on the CPU, but for the weight gradients that would go wrong."""

    def __init__(self, channels: int) -> None:
        self.channels, self.told = channels, False
        self.plain = torch.library.get_kernel("aten::convolution_backward", "CPU")
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("convolution_backward", self, "CPU", with_keyset=True)

    def __call__(
        self,
        keys: torch._C.DispatchKeySet,
        gradient: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias_sizes: list[int] | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
        mask: list[bool],
    ) -> Any:
        geometry = (bias_sizes, stride, padding, dilation, transposed, output_padding, groups)
        strided = max(stride) > 1 and not any(padding)
        if not (mask[1] and strided and groups == 1 and narrow(weight, self.channels)):
            return self.plain.call_boxed(keys, gradient, x, weight, *geometry, mask)
        if not self.told:
            self.told = True
            message = (
                f"the weight gradient of a 1x1 convolution with stride and {weight.shape[1]} input channels takes "
                f"a detour: below {self.channels} channels oneDNN gets it wrong on this processor"
            )
            # The warning names no place in the code: the caller's frame is autograd's, whose line would be shown.
            warnings.warn_explicit(message, EngineWarning, "mwpb_fast", 1)
        of_input = None
        if mask[0]:
            of_input = self.plain.call_boxed(keys, gradient, x, weight, *geometry, [True, False, False])[0]
        # Without a stride, over the positions that are read alone, oneDNN computes the same sums rightly.
        read: Any = (..., *(slice(None, None, step) for step in stride))
        gradient, x = (gradient[read], x) if transposed else (gradient, x[read])
        ones, none = [1] * len(stride), [0] * len(stride)
        geometry = (bias_sizes, ones, none, ones, transposed, none, groups)
        _, *of_weight = self.plain.call_boxed(keys, gradient, x, weight, *geometry, [False, True, mask[2]])
        return of_input, *of_weight

    def remove(self) -> None:
        """Leave convolution_backward to PyTorch again."""
        self.library._destroy()


_detour: _Detour | None = None


def narrow(weight: torch.Tensor, channels: int) -> bool:
    """Whether it is the weight of a 1x1 convolution of fewer than so many input channels. A transposed
    convolution's gradient has its outputs' number in their place, which is what stands there in its weight."""
    return weight.dim() in (3, 4) and weight.shape[1] < channels and all(size == 1 for size in weight.shape[2:])


def protect(model: torch.nn.Module) -> bool:
    """Keep weight gradients of this process right where `model`'s may go wrong; whether that takes a detour.

    To be called before a model is trained. It costs nothing where the processor, or every layer of the model, is
    free of the fault. PyTorch has no place of its own for it: how a convolution is written (a layer, a function,
    compiled) does not tell which gradient of it will be asked for, so the operation itself is replaced.
    """
    global _detour
    channels = vector_floats()
    strikes = any(p.device.type == "cpu" and narrow(p, channels) for p in model.parameters())
    if strikes and _detour is None:
        _detour = _Detour(channels)
    return strikes
