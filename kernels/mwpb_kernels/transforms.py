"""Whether derivatives are being computed by other means than ordinary reverse mode."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, ...) or a forward-mode level is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def carries_derivative(t: Tensor) -> bool:
    """Whether a forward-mode tangent or a gradient of torch.func is being computed through this tensor.

    Ordinary reverse mode does not count: there the result says itself that it requires no grad.
    """
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
        return True
    if not (torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()):
        return False
    if torch.compiler.is_compiling():
        return t.view_as(t).requires_grad  # The tracer knows it of results alone.
    while torch._C._functorch.is_functorch_wrapped_tensor(t):  # Each nested transform adds a wrapper.
        if torch._C._functorch.is_gradtrackingtensor(t) and t.requires_grad:
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False
