"""For each convolution of a twin, the library's fused call or the plain one, whichever is measured faster.

What was measured and what was refused is recorded per layer, so a report can show every choice and its reason.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mwpb_fast.engine.conv import FUSED, PLAIN, FoldedConv
from mwpb_fast.engine.net import module_mode
from mwpb_fast.engine.twin import TwinNet

MARGIN = 0.97  # the fused call must take at most this share of the plain one's time: below it is noise
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Choice:
    """layer: its name in the model. input: shape. milliseconds: median of forward and input gradient by
    implementation. chosen: the one taken. reason: why."""

    layer: str
    input: list[int]
    milliseconds: dict[str, float]
    chosen: str
    reason: str


def tune(twin: TwinNet, x: torch.Tensor, repeats: int = 10) -> list[dict[str, Any]]:
    """Set the implementation of every convolution of `twin` for batches shaped like x; JSON-ready records.

    x: (B, C, H, W) float32 images. Layers of the same shape are measured once. To be called before a CUDA
    graph is captured; it waits for the device.
    """
    seen: dict[FoldedConv, tuple[torch.Tensor, torch.Tensor | None]] = {}
    convolutions = [layer for layer in twin.layers if isinstance(layer, FoldedConv)]
    handles = [layer.register_forward_pre_hook(_note(seen)) for layer in convolutions]
    try:
        with module_mode(twin.model, training=False):
            twin.logits(x)
    finally:
        for handle in handles:
            handle.remove()
    known: dict[Any, Choice] = {}
    records = []
    for layer in convolutions:
        image, skip = seen[layer]
        sizes = (layer.stride, layer.padding, layer.dilation, layer.weight.shape, image.shape)
        key = (*map(tuple, sizes), layer.groups, layer.relu, skip is None, layer.weight.dtype, layer.bias is None)
        if key not in known:
            known[key] = _choose(layer, image, skip, repeats)
        layer.implementation = known[key].chosen
        records.append(asdict(known[key]) | {"layer": layer.name})
    return records


def take(twin: TwinNet, records: list[dict[str, Any]]) -> None:
    """Set the implementations that `tune` chose before."""
    chosen = {record["layer"]: record["chosen"] for record in records}
    for layer in twin.layers:
        if isinstance(layer, FoldedConv):
            layer.implementation = chosen[layer.name]


def _note(seen: dict[Any, Any]) -> Any:
    def hook(layer: FoldedConv, args: tuple[Any, ...]) -> None:
        skip = args[1] if len(args) > 1 else None
        seen[layer] = (args[0].detach().clone(), None if skip is None else skip.detach().clone())

    return hook


def _choose(layer: FoldedConv, x: torch.Tensor, skip: torch.Tensor | None, repeats: int) -> Choice:
    def done(milliseconds: dict[str, float], chosen: str, reason: str) -> Choice:
        return Choice(layer.name, list(x.shape), milliseconds, chosen, reason)

    if layer.weight.dtype != layer.dtype:
        return done({}, PLAIN, "its weights are kept in float32")
    try:
        plain, fused = (_run(layer, name, x, skip) for name in (PLAIN, FUSED))
    except RuntimeError as error:
        return done({}, PLAIN, f"no fused call: {(str(error).splitlines() or [''])[0]}")
    for ours, theirs in zip(fused, plain, strict=True):
        error_ratio = (ours - theirs).float().abs().max() / theirs.float().abs().max().clamp_min(1e-30)
        if not error_ratio <= TOLERANCE.get(layer.dtype, 1e-3):
            return done({}, PLAIN, f"the fused call differs by {error_ratio.item():.1e} of the largest value")
    times: dict[str, list[float]] = {PLAIN: [], FUSED: []}
    for _ in range(repeats):
        for name, taken in times.items():
            taken.append(_time(layer, name, x, skip))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    faster = medians[FUSED] <= MARGIN * medians[PLAIN]
    reason = f"fused takes {medians[FUSED] / medians[PLAIN]:.2f} of the plain time"
    return done(medians, FUSED if faster else PLAIN, reason)


def _run(
    layer: FoldedConv, name: str, x: torch.Tensor, skip: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    before, layer.implementation = layer.implementation, name
    try:
        with torch.enable_grad():
            leaf = x.requires_grad_()
            out = layer(leaf, skip)
        (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        return out.detach(), gradient
    finally:
        layer.implementation = before


def _time(layer: FoldedConv, name: str, x: torch.Tensor, skip: torch.Tensor | None) -> float:
    if x.device.type != "cuda":
        start = time.perf_counter()
        _run(layer, name, x, skip)
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    _run(layer, name, x, skip)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
