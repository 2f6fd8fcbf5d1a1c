"""A model as several processes train it together: their gradients averaged, their batch norms of one mind."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from mwpb_fast.engine.net import module_mode, untracked
from mwpb_fast.engine.onednn_fault import protect
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.sync_norm import synchronise
from mwpb_fast.system import ranks


def parallel(model: torch.nn.Module, sample: torch.Tensor, precision: Precision, sync_bn: bool) -> torch.nn.Module:
    """What the training pass goes through: `model` itself where there is one process, else PyTorch's
    DistributedDataParallel around it, with rank 0's weights. Attacks go through `model`, and send no gradients.

    sample: (B, C, H, W) float32 images on the device. sync_bn: as `DistributedConfig` has it; the model's batch
    norms are changed in place.
    """
    if ranks.count() == 1:
        return model
    if sync_bn:
        synchronise(model)
    protect(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's newer name is not known to older versions
        result = DistributedDataParallel(model, broadcast_buffers=False)
    # Its buckets are laid out anew after its first backward pass, and sums are rounded by where in a bucket they
    # stand. Two passes now, and a run that goes on has the layout of one that was never stopped.
    devices = [precision.device] if precision.device.type == "cuda" else []
    with module_mode(result, True), untracked(model), torch.random.fork_rng(devices), precision.autocast():
        result(sample).float().sum().backward()
        result(sample)
    for parameter in model.parameters():
        parameter.grad = None
    return result


@contextlib.contextmanager
def apart(model: Any) -> Iterator[None]:
    """Inside the block this process works without the others, and its training passes send nothing."""
    together = isinstance(model, DistributedDataParallel)
    with ranks.alone(), model.no_sync() if together else contextlib.nullcontext():
        yield
