"""Images and weights in channels-last or contiguous memory, as asked."""

from __future__ import annotations

from mwpb_fast.system.lazy import torch


def in_layout(x: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """x in that layout. With one channel PyTorch takes a tensor for both, and what comes of it by the strides, so
    these are made the contiguous ones where that is asked for."""
    if layout == torch.contiguous_format and x.stride() != torch.empty(x.shape, device="meta").stride():
        return x.clone(memory_format=layout)
    return x.contiguous(memory_format=layout)


def set_layout(model: torch.nn.Module, layout: torch.memory_format) -> None:
    """Put the model's weights of convolutions into that layout."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 4:
            tensor.data = in_layout(tensor.data, layout)
