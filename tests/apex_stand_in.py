"""What a run meets of NVIDIA apex, from its release 24.04 on: FusedSGD and the kernel under it, on any device.

The arguments with their order and defaults, the names in groups and state, and what its step does with weights of
either type are apex's; so is that `zero_grad` takes no argument, that the kernel goes through memory and not
through indices, and that it wants memory without gaps. Left out is what apex.amp, which is no longer there, put
into the optimiser from outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, required


def multi_tensor_sgd(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    decay: float,
    momentum: float,
    dampening: float,
    lr: float,
    nesterov: bool,
    first: bool,
    decay_after: bool,
    scale: float,
) -> None:
    """`amp_C.multi_tensor_sgd`. lists: gradients, weights, momenta, of one type. first: the momenta are empty."""
    if not all(isinstance(number, int | float) for number in (decay, momentum, dampening, lr, scale)):
        raise TypeError("multi_tensor_sgd(): incompatible function arguments")
    if len({t.dtype for of in lists for t in of}) > 1 or lists[0][0].dtype not in (torch.float16, torch.float32):
        raise RuntimeError("multi_tensor_sgd only supports some combinations of gradient & weight types")
    for tensors in zip(*lists, strict=True):
        layouts = (torch.contiguous_format, torch.channels_last)
        if not all(any(t.is_contiguous(memory_format=f) for f in layouts[: t.dim() - 2 or 1]) for t in tensors):
            raise RuntimeError("A tensor was not contiguous.")
        if noop.item():
            continue
        gradient, weight, velocity = (t.detach().as_strided((t.numel(),), (1,)) for t in tensors)
        change = gradient.float() * scale
        if not decay_after:
            change = change + decay * weight.float()
        if momentum:
            moved = change if first else velocity.float() * momentum + (1 - dampening) * change
            velocity.copy_(moved)
            change = change + momentum * moved if nesterov else moved
        if decay_after:
            change = change + decay * weight.float()
        weight.sub_((lr * change).to(weight.dtype))


class FusedSGD(Optimizer):
    def __init__(
        self,
        params: Any,
        lr: Any = required,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        if (lr is not required and lr < 0.0) or momentum < 0.0 or weight_decay < 0.0:
            raise ValueError("Invalid learning rate, momentum or weight_decay value")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        groups = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, groups)
        self.wd_after_momentum = wd_after_momentum
        self.materialize_master_grads = materialize_master_grads
        self.most_recent_scale = 1.0
        self.scale_set_by_backward = False
        self.set_grad_none = set_grad_none
        place = self.param_groups[0]["params"][0].device
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int, device=place)

    def zero_grad(self) -> None:  # type: ignore[override]
        if not self.set_grad_none:
            return super().zero_grad()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def get_momentums(self, params: list[Tensor]) -> tuple[list[Tensor], bool]:
        """The buffers, which are made where there are none, and whether that of the last one was made now."""
        first = True
        for parameter in params:
            first = "momentum_buffer" not in self.state[parameter]
            if first:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)
        return [self.state[parameter]["momentum_buffer"] for parameter in params], first

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for dtype in (torch.float16, torch.float32):
                params = [p for p in group["params"] if p.dtype == dtype and p.grad is not None]
                momenta, first = self.get_momentums(params)
                if params:
                    multi_tensor_sgd(
                        2048 * 32,
                        self._dummy_overflow_buf,
                        [[p.grad for p in params], params, momenta],
                        group["weight_decay"],
                        group["momentum"],
                        group["dampening"],
                        group["lr"],
                        group["nesterov"],
                        first,
                        self.wd_after_momentum,
                        1.0 / self.most_recent_scale,
                    )
        self.most_recent_scale, self.scale_set_by_backward = 1.0, False
        return loss
