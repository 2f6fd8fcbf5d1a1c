"""The memory layout in which a model is evaluated on CUDA.

Training in bfloat16 wants channels-last, which tensor cores read. Evaluation is in full float32, where cuDNN has
no use for them, and some of its channels-last algorithms are slower than the others. So it is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from mwpb_fast.engine.precision import full_float32
from mwpb_fast.evaluation.model_checks import weights_frozen
from mwpb_fast.system.memory import none_left

# of the channels-last time that the other must take at most: where both are near, chance must not choose
MARGIN = 0.95
READINGS = 3


def faster_layout(
    model: torch.nn.Module, x: torch.Tensor, clock: Callable[[Callable[[], object]], float] | None = None
) -> torch.memory_format:
    """Contiguous or channels-last, by the time of a forward pass with the input's gradient in full float32. The
    model's weights are then in that layout.

    model: in eval mode, on the device of x. x: (B, C, H, W) float32; half of them where they have no room. clock:
    from a call to its seconds, by default those of the CUDA device.
    """
    clock = clock or _cuda_seconds
    while True:
        try:
            return _faster(model, x, clock)
        except (MemoryError, RuntimeError) as error:
            if not none_left(error) or len(x) == 1:
                raise
        x = x[: len(x) // 2]


def _faster(
    model: torch.nn.Module, x: torch.Tensor, clock: Callable[[Callable[[], object]], float]
) -> torch.memory_format:
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)  # type: ignore[call-overload]
        images = x.detach().contiguous(memory_format=layout)

        def passes(images: torch.Tensor = images) -> None:
            leaf = images.clone().requires_grad_()
            torch.autograd.grad(model(leaf).sum(), leaf)

        with weights_frozen(model), full_float32(), torch.enable_grad():
            passes()  # libraries choose algorithms and take their memory in the first one
            seconds[layout] = statistics.median(clock(passes) for _ in range(READINGS))
    if seconds[torch.contiguous_format] > MARGIN * seconds[torch.channels_last]:
        return torch.channels_last
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return torch.contiguous_format


def _cuda_seconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
