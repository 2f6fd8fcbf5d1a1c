"""What a piece of work does on the device: every kernel with how often it ran and how long it took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernels(work: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The kernels of one call of `work`, those that take longest first: name, count and microseconds in all; on
    the CPU the operations, each without those that it calls. Raises RuntimeError where none were seen."""
    on_cuda = device.type == "cuda"
    work()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        work()
        if on_cuda:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    rows = [
        {"name": e.key, "count": e.count, "us": e.self_device_time_total if on_cuda else e.self_cpu_time_total}
        for e in events
    ]
    if not rows:
        raise RuntimeError(f"the profiler sees nothing of {device}")
    return sorted(rows, key=lambda row: -row["us"])
