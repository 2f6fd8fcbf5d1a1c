"""For each convolution of a twin, the plain call or one that fuses what follows it, whichever is measured fastest.

What was measured and what was refused is recorded per layer, so a report can show every choice and its reason.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from mwpb_fast.engine.layers import EPILOGUE, FUSED, PLAIN, FoldedConv
from mwpb_fast.engine.net import module_mode
from mwpb_fast.engine.recorder import WARM_UP, CudaRecorder
from mwpb_fast.engine.twin import TwinNet

CANDIDATES = {"cpu": (FUSED,), "cuda": (FUSED, EPILOGUE)}  # beside the plain call; on the CPU that fuses the bias
MARGIN = 0.97  # another call must take at most this share of the plain one's time: below it is noise
RUNS = 10  # of a convolution in one measurement on CUDA
# Of a layer: no more readings than these once they have taken so long; none of what takes so many times as long.
LEAST, SECONDS, HOPELESS = 3, 0.2, 1.5
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # of the largest output
# Of the gradient's L2 norm. Two right implementations round a sum near zero to different sides, so that a share f
# of the ReLUs differs and with it sqrt(2 f) of the gradient, half of the ReLUs being open. f is at most about the
# type's epsilon: 9e-2 in bfloat16, 4e-2 in float16. In float32 sums in another order differ more than roundings.
GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 5e-2}


@dataclass(frozen=True)
class Choice:
    """layer: its name in the model. input: shape. milliseconds: median of forward and input gradient by
    implementation, on CUDA as a run replays or launches them. chosen: the one taken. reason: why.
    cudnn_benchmark: whether cuDNN measured its algorithms."""

    layer: str
    input: list[int]
    milliseconds: dict[str, float]
    chosen: str
    reason: str
    cudnn_benchmark: bool


def tune(twin: TwinNet, x: torch.Tensor, repeats: int = 10, captured: bool = False) -> list[dict[str, Any]]:
    """Set the implementation of every convolution of `twin` for batches shaped like x; JSON-ready records.

    x: (B, C, H, W) float32 images. captured: whether the run will replay a CUDA graph; what is fastest without
    the launches need not be so with them. Layers of the same shape are measured once. To be called before a CUDA
    graph is captured; it waits for the device.
    """
    seen: dict[FoldedConv, tuple[torch.Tensor, torch.Tensor | None]] = {}
    convolutions = [layer for layer in twin.layers if isinstance(layer, FoldedConv)]
    handles = [layer.register_forward_pre_hook(_note(seen)) for layer in convolutions]
    try:
        with module_mode(twin.model, training=False), torch.no_grad():
            twin.graph(x)  # layer by layer, whatever the variant
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
            known[key] = _choose(layer, image, skip, repeats, captured)
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


def _choose(layer: FoldedConv, x: torch.Tensor, skip: torch.Tensor | None, repeats: int, captured: bool) -> Choice:
    def done(milliseconds: dict[str, float], chosen: str, reason: str) -> Choice:
        return Choice(layer.name, list(x.shape), milliseconds, chosen, reason, torch.backends.cudnn.benchmark)

    if layer.weight.dtype != layer.dtype:
        return done({}, PLAIN, "its weights are kept in float32")
    with torch.no_grad():
        upstream = torch.empty_like(layer.plain(x, skip))
    upstream.normal_(generator=torch.Generator(x.device).manual_seed(0))
    runs = {PLAIN: partial(_run, layer, PLAIN, x, skip, upstream)}
    plain, reasons = runs[PLAIN](), []
    for name in CANDIDATES[x.device.type]:
        run = partial(_run, layer, name, x, skip, upstream)
        if reason := _refused(name, run, plain):
            reasons.append(reason)
        else:
            runs[name] = run
    if len(runs) == 1:
        return done({}, PLAIN, "; ".join(reasons))
    medians, failure = _measure(runs, x.device, repeats, captured)
    reasons += [f"timed with its launches, since they cannot be captured: {failure}"] if failure else []
    shares = {name: medians[name] / medians[PLAIN] for name in runs if name != PLAIN}
    reasons += [f"{name} takes {share:.2f} of the plain time" for name, share in shares.items()]
    best = min(shares, key=lambda name: shares[name])
    return done(medians, best if shares[best] <= MARGIN else PLAIN, "; ".join(reasons))


def _run(
    layer: FoldedConv, name: str, x: torch.Tensor, skip: torch.Tensor | None, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient, by the implementation of that name."""
    before, layer.implementation = layer.implementation, name
    try:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            out = layer(leaf, skip)
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
        return out.detach(), gradient
    finally:
        layer.implementation = before


def _refused(
    name: str, run: Callable[[], tuple[torch.Tensor, torch.Tensor]], plain: tuple[torch.Tensor, torch.Tensor]
) -> str:
    """Why an implementation cannot be taken: it fails, or differs beyond rounding; "" where it can."""
    try:
        out, gradient = run()
    except Exception as error:  # a library, a compiler or a launch may fail in any way
        return f"no {name} call: {_first_line(error)}"
    apart = _distance(out, plain[0], torch.inf)
    if not apart <= TOLERANCE.get(out.dtype, 1e-3):
        return f"the {name} call differs by {apart:.1e} of the largest value"
    apart = _distance(gradient, plain[1], 2)
    if not apart <= GRADIENT_TOLERANCE.get(out.dtype, 1e-2):
        return f"the {name} call's gradient differs by {apart:.1e} of its norm"
    return ""


def _distance(ours: torch.Tensor, theirs: torch.Tensor, order: float) -> float:
    """Of two tensors, relative to the second, in the norm of that order."""
    apart, size = (torch.linalg.vector_norm(t, order) for t in (ours.float() - theirs.float(), theirs.float()))
    return (apart / size.clamp_min(1e-30)).item()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _measure(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, captured: bool
) -> tuple[dict[str, float], str]:
    """Median milliseconds of each run, measured in turn; and why they are not of replays, where they should be."""
    failure = ""
    with contextlib.ExitStack() as stack:
        work, count = runs, 1
        if device.type == "cuda":
            work, count = {name: partial(_several, run) for name, run in runs.items()}, RUNS
        if device.type == "cuda" and captured:
            try:
                work = _recorded(runs, device, stack)
            except Exception as error:  # as above
                failure = _first_line(error)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(repeats):
            if number >= LEAST and sum(map(sum, taken.values())) > 1e3 * SECONDS:
                break
            for name, times in taken.items():
                if number < LEAST - 1 or min(times) <= HOPELESS * min(taken[PLAIN]):
                    times.append(_milliseconds(work[name], device))
    return {name: statistics.median(times) / count for name, times in taken.items()}, failure


def _several(run: Callable[[], object]) -> None:
    for _ in range(RUNS):
        run()


def _recorded(
    runs: Mapping[str, Callable[[], object]], device: torch.device, stack: contextlib.ExitStack
) -> dict[str, Callable[[], object]]:
    """Each run RUNS times, as a CUDA graph: launched one by one on an idle device, a convolution takes as long as
    its launches, which a captured run does not make. Raises what capturing any of them does."""
    replays: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        recorder = CudaRecorder(device)
        stack.callback(recorder.close)
        for _ in range(WARM_UP):
            recorder.warm_up(run)
        recorder.capture(partial(_several, run))
        replays[name] = recorder.replay
    return replays


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end)
