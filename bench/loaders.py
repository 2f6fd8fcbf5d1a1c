"""The loaders in turn in one run: images a second alone, and how long a training step waits for each.

    python bench/loaders.py --shared ../shared/data --json bench/results/loaders-cpu.json
    python bench/loaders.py --data-dir data --sets cifar10 tinyimagenet --json ...

Sets are random images of CIFAR-10's size and number, and those of --sets that are prepared in --data-dir, or
whose archives lie in --shared. The resident loader holds decoded images on the device; DALI is fed pixels, or
image files where they were kept, which it decodes. `default` marks what `data.loader=auto` takes on this device.
In training, the wait is the time inside the loader's next(), as metrics.jsonl gives it; beside it stands the
loader's own time for a batch as a share of the step's, which on a GPU includes what the host does not wait for.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
from ceilings import emulated
from measure import SkippedError, keep_freed_memory, spread
from record import Results, leave_at_sigterm
from train import Variant, make_step

from mwpb_fast import data
from mwpb_fast.config import recipe
from mwpb_fast.data.dataset import Config, Images, Loader
from mwpb_fast.data.resident import ResidentLoader
from mwpb_fast.method import Method
from mwpb_fast.runs.log import Waits

COLUMNS = (
    ("set", "data", ""),
    ("loader", "loader", ""),
    ("default", "default", ""),
    ("faster", "times the first's speed", ".2f"),
    ("images_per_second", "images/s alone", ",.0f"),
    ("step_ms", "ms a training step", ",.1f"),
    ("wait_share", "of it waiting", ".2%"),
    ("own_share", "loader's own time, of a step", ".2%"),
)
KINDS = ("resident", "dali, pixels", "dali, files")


def random_images(count: int, size: int) -> Images:
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10, tuple("0123456789"), origin="random images")


def prepared(name: str, o: argparse.Namespace, folder: Path) -> tuple[Config, Images]:
    """A data set with its configuration."""
    if name == "random":
        return Config(name=name, batch_size=o.batch), random_images(o.random, 32)
    where = Path(o.data_dir)
    if not (where / name / "meta.json").exists():
        if o.shared is None:
            raise SkippedError(f"not prepared in {where}, and no --shared")
        where = folder
        data.prepare(name, source=archive(name, o.shared), dir=folder, encoded=True)
    config = Config(name=name, dir=str(where), batch_size=o.batch)
    return config, data.load_split(config, "train")


def archive(name: str, shared: Path) -> Path:
    found = sorted(shared.glob(f"{name}*.tar*"))
    if not found:
        raise SkippedError(f"no {name}*.tar* in {shared}")
    return found[0]


def make(kind: str, config: Config, images: Images, device: torch.device) -> Loader:
    if kind == "resident":
        return ResidentLoader(images, config, seed=0, device=device)
    from mwpb_fast.data.dali import DaliLoader

    encoded = None
    if kind == "dali, files":
        encoded = None if images.origin == "random images" else data.load_encoded(config)
        if encoded is None:
            raise SkippedError("the image files were not kept")
    return DaliLoader(images, config, seed=0, device=device, encoded=encoded)


def default(config: Config, images: Images, device: torch.device) -> str:
    """What auto takes."""
    loader = "resident" if images.images.nbytes <= data.memory_budget(device) else "dali"
    return loader if config.loader == "auto" else config.loader


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def alone(loader: Loader, epoch: int, limit: float, device: torch.device) -> float:
    """Images a second over an epoch, or over `limit` seconds of it; the first batch is not timed."""
    batches = loader.epoch(epoch)
    next(batches)
    wait(device)
    started, images = time.perf_counter(), 0
    for x, _, _ in batches:
        images += len(x)
        if time.perf_counter() - started > limit:
            break
    wait(device)
    return images / (time.perf_counter() - started)


def in_training(
    loader: Loader, step: Callable[..., Any], method: Method, o: argparse.Namespace
) -> tuple[float, float]:
    """Seconds a step, and the share of it that was spent in the loader's next(); after a first step."""
    key = torch.tensor([ops.derive_seed(0, 1)], device=o.device)
    batches = loader.epoch(1)

    def take(items: Iterator[Any]) -> None:
        for batch in items:
            step(batch, key, method)
        wait(o.device)

    take(itertools.islice(batches, 1))
    count = min(o.steps, len(loader) - 1)
    waits = Waits(itertools.islice(batches, count))
    started = time.perf_counter()
    take(waits)
    elapsed = time.perf_counter() - started
    return elapsed / count, waits.seconds / elapsed


def measure(config: Config, images: Images, o: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    loaders: dict[str, Loader] = {}
    for kind in KINDS:
        try:
            loaders[kind] = make(kind, config, images, o.device)
            next(loaders[kind].epoch(1))
        except Exception as error:  # a loader that cannot run is named, and the others go on
            loaders.pop(kind, None)
            results.skip(f"{config.name}, {kind}", error)
    rates: dict[str, list[float]] = {kind: [] for kind in loaders}
    steps: dict[str, list[float]] = {kind: [] for kind in loaders}
    waits: dict[str, list[float]] = {kind: [] for kind in loaders}
    row_of_recipe, o.classes = recipe("table1.mwpb_at"), images.num_classes
    low = torch.float32 if emulated(torch.bfloat16, o.device) else torch.bfloat16
    variant = Variant(low, torch.channels_last, twin=True)
    step, method = None, Method.build(row_of_recipe)
    for turn in range(o.rounds):
        for kind, loader in loaders.items():
            rates[kind].append(alone(loader, turn + 2, o.seconds, o.device))
            if step is None:
                sample = next(loader.epoch(1)).x
                step = make_step(variant, row_of_recipe, sample, o)
            seconds, share = in_training(loader, step, method, o)
            steps[kind].append(seconds)
            waits[kind].append(share)
    rows = []
    for kind, taken in rates.items():
        faster = spread([t / b for t, b in zip(taken, rates[next(iter(rates))], strict=True)])
        own = [o.batch / rate / s for rate, s in zip(taken, steps[kind], strict=True)]
        row = {
            "set": f"{config.name}, {images.images.shape[2]}x{images.images.shape[3]}",
            "loader": kind,
            "default": kind.startswith(default(config, images, o.device)),
            "images": len(images),
            "faster": faster["median"],
            "images_per_second": statistics.median(taken),
            "step_ms": statistics.median(steps[kind]) * 1e3,
            "wait_share": statistics.median(waits[kind]),
            "own_share": statistics.median(own),
            "spread": {k: spread(v[kind]) for k, v in (("rate", rates), ("step", steps), ("wait", waits))},
            "faster_spread": faster,
        }
        rows.append(row)
        print(
            f"{row['set']:24s} {kind:14s} {row['faster']:6.2f}x {row['images_per_second']:12,.0f} images/s alone; "
            f"step {row['step_ms']:8.1f} ms, {row['wait_share']:7.2%} waiting, own time {row['own_share']:7.2%}",
            flush=True,
        )
    for loader in loaders.values():
        loader.close()
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", default=["cifar10", "tinyimagenet"])
    parser.add_argument("--data-dir", default="data", help="folder of prepared data sets")
    parser.add_argument("--shared", type=Path, help="folder of archives, NAME*.tar*, for sets not prepared")
    parser.add_argument("--random", type=int, default=50_000, help="number of random images")
    parser.add_argument("--model", default="", help="of the training step; resnet-18, on the CPU smallresnet-8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: 50 on CUDA, else 3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of loading alone, in each round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--json", type=Path, help="where to write the results")
    o = parser.parse_args(arguments)
    if o.threads:
        torch.set_num_threads(o.threads)
    o.device, o.tune, o.choices = torch.device(o.device), False, {}
    on_cuda = o.device.type == "cuda"
    o.model = o.model or ("resnet-18" if on_cuda else "smallresnet-8")
    o.steps = o.steps or (50 if on_cuda else 3)
    kept = None if on_cuda else keep_freed_memory()
    settings = {k: getattr(o, k) for k in ("model", "batch", "steps", "rounds")}
    more = {"freed_memory_kept": kept, "load": os.getloadavg()[0]}
    results = Results(o.json, o.device, COLUMNS, ["random", *o.sets], **settings, **more)
    for name in list(results.unfinished):
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows = measure(*prepared(name, o, Path(folder)), o, results)
            except Exception as error:  # a set that is not there is named, and the others go on
                results.skip(name, error)
        results.put(name, rows)


if __name__ == "__main__":
    leave_at_sigterm()
    main()
