"""Times every fused op against its plain PyTorch reference, eager and compiled, and against a copy.

`python bench/kernels.py --json bench/results/kernels-cpu.json` times all variants of an op in turn and writes
the file from which docs/performance.md's table is made. `pytest bench/kernels.py` gives pytest-benchmark's
statistics of the same calls. An op is in both by having a record in `mwpb_kernels.OPS`. No op is timed that
does not first give what its reference gives.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import ROTATED, OnCpu, OnCuda, Timing, in_turn, keep_freed_memory, reason
from mwpb_kernels import OPS, implementation
from mwpb_kernels.op import Op
from record import Results

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128
# what a step spends its time in comes before the others, which a run that is cut off may lack
FIRST = ("linf_step_", "scale_bias_relu", "batch_norm_relu", "ce_grad", "gaussian_start", "crop_flip")
LARGE = 128 * 2**20  # bytes moved: beyond any cache
COLUMNS = [
    ("op", "op", ""),
    ("case", "case", ""),
    ("shape", "shape", ""),
    ("vs_eager", "times eager", ".1f"),
    ("vs_compiled", "times compiled", ".1f"),
    ("share_of_copy", "share of copy's bandwidth", ".0%"),
    ("gb_s", "GB/s", ".1f"),
    ("copy_gb_s", "copy GB/s", ".1f"),
    ("median_us", "median µs", ".1f"),
    ("quartiles_us", "quartiles µs", ""),
    ("implementation", "implementation", ""),
]


# cases -------------------------------------------------------------------------------------------------------
def tree(f: Callable[[torch.Tensor], Any], args: Any) -> Any:
    if isinstance(args, torch.Tensor):
        return f(args)
    return type(args)(tree(f, a) for a in args) if isinstance(args, tuple | list) else args


def tensors(args: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree(found.append, args)
    return found


def typical(op: Op) -> tuple[Any, ...]:
    """The largest sample of a batch of 128 (of any, where there is none) that has no float64."""
    samples = [s for s in op.samples(DEVICE) if all(t.dtype != torch.float64 for t in tensors(s))]
    batches = [s for s in samples if any(t.dim() and len(t) == BATCH for t in tensors(s))]
    return max(batches or samples, key=lambda s: op.bytes_moved(*s))


def enlarged(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments repeated along the batch (lists: as lists) until the op moves LARGE bytes."""
    times = -(-LARGE // op.bytes_moved(*args))
    first = tensors(args)[0]

    def repeated(t: torch.Tensor) -> torch.Tensor:
        if t is not first and (t.dim() == 0 or len(t) != BATCH):  # a key, or values of a channel
            return t
        out = t.repeat(times, *(1,) * (t.dim() - 1))
        dense = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
        return out.contiguous(memory_format=torch.channels_last) if dense else out

    def grown(argument: Any) -> Any:
        if isinstance(argument, list):
            return [t.clone(memory_format=torch.preserve_format) for _ in range(times) for t in argument]
        return tree(repeated, argument)

    out = {a.name: grown(v) for a, v in zip(op.dispatched._schema.arguments, args, strict=True)}
    if "images" in out and "index" in out:  # a large data set is worth its name only if all of it is used
        out["index"] = torch.randint(len(out["images"]), out["index"].shape, device=DEVICE)
    return tuple(out.values())


def arguments(op: Op, case: str) -> tuple[Any, ...]:
    """case: typical or large."""
    return typical(op) if case == "typical" else enlarged(op, typical(op))


def own(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with copies of those that the op writes."""
    copy = partial(tree, lambda t: t.clone(memory_format=torch.preserve_format))
    return tuple(copy(a) if i in op.mutates else a for i, a in enumerate(args))


def shape_of(op: Op, args: tuple[Any, ...]) -> str:
    """The largest tensor that goes in or comes out; for lists their length and elements."""
    lists = [a for a in args if isinstance(a, list)]
    if lists:
        return f"{len(lists[0])} tensors, {sum(t.numel() for t in lists[0]):,} elements"
    results = tensors(op.fake(*args))
    largest = max(results or tensors(args), key=lambda t: t.numel())
    return f"{'x'.join(map(str, largest.shape))} {str(largest.dtype).removeprefix('torch.')}"


def difference(op: Op, args: tuple[Any, ...]) -> float:
    """Largest difference between op and reference, results and written arguments; raises where it is too large."""
    mine, theirs = own(op, args), own(op, args)
    pairs = [
        *zip(tensors(op.dispatched(*mine)), tensors(op.reference(*theirs)), strict=True),
        *((a, b) for i in op.mutates for a, b in zip(tensors(mine[i]), tensors(theirs[i]), strict=True)),
    ]
    largest = 0.0
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype.itemsize < 4 else 1e-4, atol=1e-5, equal_nan=True)
        if a.numel():
            largest = max(largest, (a.double() - b.double()).abs().nan_to_num().max().item())
    return largest


# timing ------------------------------------------------------------------------------------------------------
def variants(op: Op, args: tuple[Any, ...], compiled: bool) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"op": op.dispatched, "eager": op.reference}
    if compiled:
        torch.compiler.reset()
        function = torch.compile(op.reference, dynamic=False)
        try:
            function(*own(op, args))
        except Exception as error:  # a backend that fails on one op must not hide the other figures
            warnings.warn(f"{op.name}: torch.compile failed: {str(error).splitlines()[0]}", stacklevel=2)
        else:
            found["compiled"] = function
    return found


def task(call: Callable[..., Any], op: Op, args: tuple[Any, ...]) -> OnCpu | OnCuda:
    if DEVICE.type == "cpu":
        return OnCpu(partial(call, *own(op, args)))
    copies = max(1, min(64, ROTATED // max(1, op.bytes_moved(*args))))
    copy = partial(tree, lambda t: t.clone(memory_format=torch.preserve_format))
    return OnCuda([partial(call, *copy(args)) for _ in range(copies)])


def copy_task(volume: int) -> OnCpu | OnCuda:
    """torch.Tensor.copy_ that moves `volume` bytes: half of them read, half written."""
    source = torch.randint(256, (max(1, volume // 2),), dtype=torch.uint8, device=DEVICE)
    if DEVICE.type == "cpu":
        return OnCpu(partial(torch.empty_like(source).fill_(1).copy_, source))
    copies = max(1, min(64, ROTATED // max(1, volume)))
    return OnCuda([partial(torch.empty_like(source).copy_, source.clone()) for _ in range(copies)])


def measured(
    op: Op, case: str, args: tuple[Any, ...], compiled: bool, rounds: int, budget: float
) -> dict[str, Any]:
    """One row: the op, its rivals and the copy, timed in turn."""
    largest = difference(op, args)
    volume = op.bytes_moved(*args)
    tasks = {name: task(call, op, args) for name, call in variants(op, args, compiled).items()}
    times: dict[str, Timing] = in_turn({**tasks, "copy": copy_task(volume)}, rounds, budget)
    mine = times["op"]
    return {
        "op": op.name,
        "case": case,
        "shape": shape_of(op, args),
        "vs_eager": times["eager"].median / mine.median,
        "vs_compiled": times["compiled"].median / mine.median if "compiled" in times else None,
        "share_of_copy": times["copy"].median / mine.median,
        "gb_s": volume / mine.median / 1e9,
        "copy_gb_s": volume / times["copy"].median / 1e9,
        "median_us": mine.median * 1e6,
        "quartiles_us": f"{mine.low * 1e6:.1f} to {mine.high * 1e6:.1f}",
        "implementation": implementation(op.name, DEVICE),
        "bytes_moved": volume,
        "largest_difference": largest,
        "medians_us": {name: t.median * 1e6 for name, t in times.items()},
        "rounds": mine.rounds,
    }


def failed(op: Op, case: str, error: Exception) -> dict[str, Any]:
    """The row of an op that gives something else than its reference, or nothing."""
    return {key: None for key, _, _ in COLUMNS} | {
        "op": op.name,
        "case": case,
        "implementation": f"{implementation(op.name, DEVICE)}, failed: {reason(error)}",
    }


def say(row: dict[str, Any]) -> None:
    against = f"{row['vs_compiled']:6.1f}x compiled" if row["vs_compiled"] else " " * 16
    print(
        f"{row['op']:22} {row['case']:8} {row['vs_eager']:7.1f}x eager {against} {row['share_of_copy']:6.0%} of "
        f"copy ({row['gb_s']:.1f} of {row['copy_gb_s']:.1f} GB/s)  {row['median_us']:.1f} µs "
        f"({row['quartiles_us']})  {row['shape']}",
        flush=True,
    )


# pytest-benchmark --------------------------------------------------------------------------------------------
def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("name", sorted(OPS))
    metafunc.parametrize("case", ["typical", "large"])
    metafunc.parametrize("variant", ["op", "eager", "compiled", "copy"])


def test_speed(benchmark: Any, name: str, case: str, variant: str) -> None:
    keep_freed_memory()
    op = OPS[name]
    args = arguments(op, case)
    benchmark.group = f"{name}, {case}: {shape_of(op, args)}"
    if variant == "copy":
        timed = copy_task(op.bytes_moved(*args))
    else:
        if variant == "op":
            difference(op, args)
        calls = variants(op, args, compiled=variant == "compiled")
        if variant not in calls:
            import pytest  # the command needs none

            pytest.skip("torch.compile failed")
        timed = task(calls[variant], op, args)
    benchmark.extra_info["bytes_moved"] = op.bytes_moved(*args)
    benchmark.pedantic(timed.call if isinstance(timed, OnCpu) else timed.round, rounds=5, warmup_rounds=1)


# command line ------------------------------------------------------------------------------------------------
def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"which ops (default: all): {', '.join(sorted(OPS))}")
    parser.add_argument("--json", type=Path, help="result file to write anew, with these ops alone")
    parser.add_argument("--rounds", type=int, default=25, help="readings of the clock for each variant")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a case, after three rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-seconds", type=float, default=1e9, help="leave torch.compile out after so many seconds"
    )
    options = parser.parse_args(words)
    unknown = sorted(set(options.ops) - set(OPS))
    if unknown:
        parser.error(f"no op {unknown[0]!r}; the ops are {', '.join(sorted(OPS))}")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # a reference may read a value; that is no news
    kept = keep_freed_memory() if DEVICE.type == "cpu" else None
    parts = list(dict.fromkeys(options.ops or [*FIRST, *sorted(OPS)]))
    results = Results(options.json, DEVICE, COLUMNS, parts, freed_memory_kept=kept)
    started = time.monotonic()
    for name in list(results.unfinished):
        op, rows = OPS[name], []
        for case in ("typical", "large"):
            compiled = not options.no_compile and time.monotonic() - started < options.compile_seconds
            if f"{name} {case}" in results.skipped:  # it ended the process that goes on here
                rows.append(failed(op, case, RuntimeError(results.skipped[f"{name} {case}"])))
                continue
            try:
                row = measured(op, case, arguments(op, case), compiled, options.rounds, options.budget)
            except Exception as error:  # named, and the others go on
                results.skip(f"{name} {case}", error)
                rows.append(failed(op, case, error))
            else:
                rows.append(row)
                say(row)
        results.put(name, rows)


if __name__ == "__main__":
    main()
