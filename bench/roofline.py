"""What bounds each layer of a model, arithmetic or memory, and how near to that bound it runs.

    python bench/roofline.py --model resnet-18 --batch 128 --json bench/results/roofline-resnet-18-cpu.json

For each distinct convolution and linear layer, forward pass and input gradient: floating-point operations, the
least bytes (each operand once), their quotient beside the machine's (matrix rate over copy bandwidth, both
measured in the same run), the time that the nearer bound allows, and the time measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ceilings import copy_bandwidth, emulated, matrix_rate
from measure import ROTATED, OnCpu, OnCuda, SkippedError, command_line, in_turn, settled, write_results
from torch import Tensor, nn

from mwpb_fast.models import build_model

COLUMNS = (
    ("layer", "layer", ""),
    ("count", "of them", "d"),
    ("call", "pass", ""),
    ("gflop", "GFLOP each", ".2f"),
    ("mb", "MB each", ".1f"),
    ("intensity", "FLOP per byte", ".0f"),
    ("bound", "bound by", ""),
    ("least_us", "least µs", ",.0f"),
    ("median_us", "median µs", ",.0f"),
    ("share", "of the bound", ".0%"),
)


@dataclass(frozen=True)
class Shape:
    """A convolution, or a linear layer as one over a single position: input, weight, stride, padding."""

    image: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def out(self) -> tuple[int, ...]:
        height, width = (
            (self.image[2 + i] + 2 * self.padding[i] - self.weight[2 + i]) // self.stride[i] + 1 for i in (0, 1)
        )
        return self.image[0], self.weight[0], height, width

    @property
    def flop(self) -> int:
        batch, _, height, width = self.out
        return 2 * batch * height * width * _product(self.weight)

    def bytes(self, itemsize: int) -> int:
        """Of image (or its gradient), weight and result (or its gradient)."""
        return itemsize * sum(map(_product, (self.image, self.weight, self.out)))

    def __str__(self) -> str:
        _, channels, height, width = self.image
        stride = f", stride {self.stride[0]}" if self.stride[0] > 1 else ""
        kernel = f"{self.weight[2]}x{self.weight[3]}"
        return f"{kernel} {channels} to {self.weight[0]} at {height}x{width}{stride}"


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def shapes(model: nn.Module, batch: int, size: int) -> dict[Shape, int]:
    """The distinct layers of a model without groups or dilation, and how many there are of each."""
    found: dict[Shape, int] = {}

    def note(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, nn.Linear):
            shape = Shape((batch, module.in_features, 1, 1), (*module.weight.shape, 1, 1), (1, 1), (0, 0))
        else:
            image = (batch, *args[0].shape[1:])
            shape = Shape(image, tuple(module.weight.shape), tuple(module.stride), tuple(module.padding))
        found[shape] = found.get(shape, 0) + 1

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_hook(note) for m in layers]
    try:
        with torch.no_grad():
            model(torch.zeros(2, 3, size, size, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def calls(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The forward pass and the input gradient on random data of their own."""

    def random(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    x, weight, gradient = random(shape.image), random(shape.weight), random(shape.out)
    geometry = (list(shape.stride), list(shape.padding), [1, 1])

    def backward() -> Tensor:
        of_input, _, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, *geometry, False, [0, 0], 1, (True, False, False)
        )
        return of_input

    return {"forward": partial(torch.conv2d, x, weight, None, *geometry), "input gradient": backward}


def task(shape: Shape, name: str, dtype: torch.dtype, device: torch.device) -> OnCpu | OnCuda:
    if device.type == "cpu":
        return OnCpu(calls(shape, dtype, device)[name])
    copies = max(1, min(16, ROTATED // shape.bytes(dtype.itemsize)))
    return OnCuda([calls(shape, dtype, device)[name] for _ in range(copies)])


def roofline(
    model: nn.Module,
    batch: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int = 7,
    budget: float = 2.0,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The table's rows, the last one their sum over all layers, and the two ceilings measured beside them.

    budget: seconds a layer and pass, after three rounds.
    """
    ceilings = {"flop_per_second": matrix_rate(dtype, device), "bytes_per_second": copy_bandwidth(device)}
    ridge = ceilings["flop_per_second"] / ceilings["bytes_per_second"]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape, count in shapes(model, batch, size).items():
            for name in ("forward", "input gradient"):
                timing = in_turn({name: task(shape, name, dtype, device)}, rounds, budget)[name]
                volume = shape.bytes(dtype.itemsize)
                intensity = shape.flop / volume
                least = max(shape.flop / ceilings["flop_per_second"], volume / ceilings["bytes_per_second"])
                rows.append(
                    {
                        "layer": str(shape),
                        "count": count,
                        "call": name,
                        "gflop": shape.flop / 1e9,
                        "mb": volume / 1e6,
                        "intensity": intensity,
                        "bound": "arithmetic" if intensity > ridge else "memory",
                        "least_us": least * 1e6,
                        "median_us": timing.median * 1e6,
                        "quartiles_us": [timing.low * 1e6, timing.high * 1e6],
                        "share": least / timing.median,
                    }
                )

    def total(key: str) -> float:
        return sum(row[key] * row["count"] for row in rows)

    rows.append(
        {
            "layer": "all",
            "count": sum(row["count"] for row in rows) // 2,
            "call": "both",
            "gflop": total("gflop"),
            "mb": total("mb"),
            "intensity": total("gflop") / total("mb") * 1e3,
            "bound": "-",
            "least_us": total("least_us"),
            "median_us": total("median_us"),
            "share": total("least_us") / total("median_us"),
        }
    )
    return rows, ceilings | {"ridge_flop_per_byte": ridge}


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="resnet-18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a layer and pass, after three rounds")
    o = settled(parser.parse_args(arguments))
    low = o.dtype == "bf16" or (o.dtype == "auto" and not emulated(torch.bfloat16, o.device))
    dtype = torch.bfloat16 if low else torch.float32
    model = build_model(o.model, num_classes=10).to(o.device).eval()
    try:
        rows, ceilings = roofline(model, o.batch, o.size, dtype, o.device, o.rounds, o.budget)
    except SkippedError as error:
        raise SystemExit(f"--dtype {o.dtype}: {error}; take fp32") from None
    for row in rows:
        print(
            f"{row['layer']:32s} x{row['count']:<2d} {row['call']:15s} {row['intensity']:6.0f} FLOP/byte  "
            f"{row['bound']:10s} {row['least_us']:9.0f} µs least {row['median_us']:9.0f} µs  {row['share']:4.0%}"
        )
    if o.json:
        settings = {"model": o.model, "batch": o.batch, "size": o.size, "dtype": str(dtype)}
        write_results(o.json, o.device, COLUMNS, rows, **settings, ceilings=ceilings, freed_memory_kept=o.kept)


if __name__ == "__main__":
    main()
