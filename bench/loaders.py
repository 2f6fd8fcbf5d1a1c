"""The loaders in turn in one run: images a second alone, and how long a training step waits for each.

    python bench/loaders.py --shared ../shared/data --json bench/results/loaders-cpu.json
    python bench/loaders.py --data-dir data --sets cifar10 tinyimagenet --json ...

Sets are random images of SVHN's size and number, which are fed as its recipes do, and those of --sets that are
prepared in --data-dir, or whose archives lie in --shared. folder:64 is a folder of JPEGs of 64x64, which are Tiny
ImageNet's own; folder:224 is one of 224x224, made from them by Pillow, so that a file is smaller, and decoded a
little sooner, than a photograph of that size. The resident loader holds decoded images on the device; DALI is fed
pixels, or image files where they were kept, which it decodes. `default` marks what `data.loader=auto` takes on
this device. In training, the wait is the time inside the loader's next(), as metrics.jsonl gives it; beside it
stands the loader's own time for a batch as a share of the step's, which on a GPU includes what the host does not
wait for.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
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
from measure import SkippedError, command_line, ratios, settled, spread
from PIL import Image
from record import Results, leave_at_sigterm
from steps import Variant, make_model, make_step

from mwpb_fast import data
from mwpb_fast.config import recipe
from mwpb_fast.data.dataset import Config, Images, Loader
from mwpb_fast.data.fit import Fit
from mwpb_fast.data.prepared import set_folder, split_name
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


SETS = ("cifar10", "tinyimagenet", "folder:64", "folder:224")
SVHN = 73_257  # its training images


def random_images(count: int, size: int) -> Images:
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10, tuple("0123456789"), origin="random images")


def prepared(name: str, o: argparse.Namespace, folder: Path) -> tuple[Config, Images]:
    """A data set with its configuration; images larger than 64x64 go in batches of a quarter of the size."""
    if name == "random":
        config = Config(name="random, as SVHN", batch_size=o.batch, pad=0, flip=False)
        return config, random_images(o.random, 32)
    where = Path(o.data_dir)
    if not (set_folder(where, name) / "meta.json").exists():
        if o.shared is None:
            raise SkippedError(f"not prepared in {where}, and no --shared")
        where, kind, size = folder, *split_name(name)
        source = archive(name, o.shared) if kind != "folder" else jpegs(int(size), o, folder / "jpegs")
        data.prepare(name, source=source, dir=folder, encoded=True)
    config = Config(name=name, dir=str(where), batch_size=o.batch)
    images = data.load_split(config, "train")
    large = images.images.shape[-1] > 64
    return dataclasses.replace(config, batch_size=max(1, o.batch // 4)) if large else config, images


def jpegs(size: int, o: argparse.Namespace, target: Path) -> Path:
    """A folder with a folder of JPEGs for each class of Tiny-ImageNet: its files, or so many made from them."""
    from mwpb_fast.data.archive import open_tree

    with open_tree(archive("tinyimagenet", o.shared)) as tree:
        raw = data.find_set("tinyimagenet").read(tree, "tinyimagenet")
    for split, encoded in (("train", raw.train), ("test", raw.test)):
        every = 1 if size == 64 else max(1, len(encoded.contents) // o.jpegs)
        for i in range(0, len(encoded.contents), every):
            path = target / split / str(encoded.labels[i]) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if size == 64:
                path.write_bytes(encoded.contents[i])
            else:
                image = Image.open(io.BytesIO(encoded.contents[i])).convert("RGB")
                Fit(resize=(size,)).apply(image).save(path, quality=90)
    return target


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
    mwpb_at = recipe("table1.mwpb_at")
    variant = Variant(torch.float32 if emulated(torch.bfloat16, o.device) else torch.bfloat16, twin=True)
    step, method = None, Method.build(mwpb_at)
    for turn in range(o.rounds):
        for kind, loader in loaders.items():
            rates[kind].append(alone(loader, turn + 2, o.seconds, o.device))
            if step is None:
                sample = next(loader.epoch(1)).x
                model = make_model(variant, o.model, sample, classes=images.num_classes)
                step = make_step(variant, mwpb_at, model, sample)
            seconds, share = in_training(loader, step, method, o)
            steps[kind].append(seconds)
            waits[kind].append(share)
    files = None if images.origin == "random images" else data.load_encoded(config)
    rows = []
    for kind, taken in rates.items():
        faster = ratios(taken, next(iter(rates.values())))
        own = [config.batch_size / rate / s for rate, s in zip(taken, steps[kind], strict=True)]
        row = {
            "set": f"{config.name}, {images.images.shape[2]}x{images.images.shape[3]}",
            "loader": kind,
            "default": kind.startswith(default(config, images, o.device)),
            "images": len(images),
            "batch": config.batch_size,
            "image_bytes": images.images[0].nbytes,
            "file_bytes": files and files.data.nbytes / len(files),
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
    parser = command_line(__doc__)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--data-dir", default="data", help="folder of prepared data sets")
    parser.add_argument("--shared", type=Path, help="folder of archives, NAME*.tar*, for sets not prepared")
    parser.add_argument("--random", type=int, default=SVHN, help="number of random images")
    parser.add_argument("--jpegs", type=int, default=2000, help="number of those of folder:224")
    parser.add_argument("--model", default="", help="of the training step; resnet-18, on the CPU smallresnet-8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: 50 on CUDA, else 3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of loading alone, in each round")
    o = settled(parser.parse_args(arguments))
    on_cuda = o.device.type == "cuda"
    o.model = o.model or ("resnet-18" if on_cuda else "smallresnet-8")
    o.steps = o.steps or (50 if on_cuda else 3)
    settings = {k: getattr(o, k) for k in ("model", "batch", "steps", "rounds")}
    more = {"freed_memory_kept": o.kept, "load": os.getloadavg()[0]}
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
