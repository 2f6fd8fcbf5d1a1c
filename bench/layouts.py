"""A model's float32 passes in both memory layouts, as an evaluation makes them: in which cuDNN is faster.

    python bench/layouts.py --json bench/results/layouts.json

A forward pass with the input's gradient, in full float32 and, on CUDA, in TF32. A round times each once. The
trainer measures the same for itself (mwpb_fast/evaluation/layout.py).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable

import torch
from ceilings import multiply_adds
from measure import command_line, full_float32, seconds, settled, spread, write_results
from torch import Tensor, nn

from mwpb_fast.models import build_model

COLUMNS = (
    ("arithmetic", "convolutions in", ""),
    ("layout", "layout", ""),
    ("ms", "ms", ",.2f"),
    ("gflops", "GFLOP/s", ",.0f"),
)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def passes(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf).sum(), leaf)

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="resnet-18")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=7)
    o = settled(parser.parse_args(arguments))
    x = torch.rand(o.batch, 3, o.size, o.size, device=o.device)
    work: dict[tuple[str, str], Callable[[], object]] = {}
    kinds = ("float32", "TF32") if o.device.type == "cuda" else ("float32",)
    for name, layout in LAYOUTS.items():
        model = build_model(o.model, num_classes=10).to(o.device).eval().requires_grad_(False)
        model.to(memory_format=layout)  # type: ignore[call-overload]
        work |= {(kind, name): passes(model, x.contiguous(memory_format=layout)) for kind in kinds}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for turn in range(o.rounds + 1):  # the first warms up
        for (kind, name), run in work.items():
            with full_float32() if kind == "float32" else contextlib.nullcontext():
                once = seconds(run, o.device)
            taken[kind, name] += [once] if turn else []
    flop = 4 * multiply_adds(build_model(o.model, num_classes=10), o.size) * o.batch
    rows = []
    for (kind, name), times in taken.items():
        ms, rate = 1e3 * statistics.median(times), flop / statistics.median(times) / 1e9
        rows.append({"arithmetic": kind, "layout": name, "ms": ms, "gflops": rate, "seconds": spread(times)})
        print(f"{kind:8s} {name:14s} {ms:10.2f} ms {rate:10,.0f} GFLOP/s")
    if o.json:
        settings = {k: getattr(o, k) for k in ("model", "batch", "size", "rounds")}
        write_results(o.json, o.device, COLUMNS, rows, **settings, freed_memory_kept=o.kept)


if __name__ == "__main__":
    main()
