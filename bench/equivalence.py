"""The ledger of the fast paths: what each changes against the eager float32 reference, on real images.

    python bench/equivalence.py --archive cifar10-jpeg.tar.xz --json bench/results/equivalence-cpu.json

Attack rows, for trained weights: share of the input gradient's signs, by count and by absolute mass, that agree
with the reference's; difference of the adversarial images; loss after the attack relative to the reference's;
robust accuracy, at radii where the model holds and where it does not. Training rows, for AT, TRADES and MART:
distance of the loss curve from the reference's with the same seed, beside the distances between the reference's
own seeds (see curves.py). The reference runs with reference ops and in full float32, the paths as the trainer runs
them. Each row says whether it is in bounds. What was finished is in the result file and beside it, so a run that
was cut off goes on from there. Without --archive the images are scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
import torch.nn.functional as F
from ceilings import emulated
from curves import OBJECTIVES, Parts, as_oracle, loss_curve, training_rows
from measure import SkippedError, command_line, settled
from record import Results
from steps import ORACLE
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Batch, Net
from mwpb_fast.models import build_model, load_weights, read_checkpoint

# least share of mass, least ratio of losses, greatest difference of robust accuracy in points
BOUNDS = {"mass_agreeing": 0.995, "loss_ratio": 0.99, "robust_difference": 0.3}
COLUMNS = {
    "attack": [
        ("path", "path", ""),
        ("weights", "weights", ""),
        ("eps", "radius, 255ths", "g"),
        ("mass_agreeing", "mass of agreeing signs", ".4f"),
        ("signs_agreeing", "agreeing signs", ".4f"),
        ("difference_max", "largest difference", ".4f"),
        ("difference_mean", "mean difference", ".5f"),
        ("loss_ratio", "loss against the reference's", ".4f"),
        ("robust_difference", "robust accuracy, points apart", ".2f"),
        ("in_bounds", "in bounds", ""),
    ],
    "training": [
        ("path", "path", ""),
        ("objective", "objective", ""),
        ("steps", "steps", "d"),
        ("distance", "distance from the reference", ".4f"),
        ("allowed", "mean distance between its seeds", ".4f"),
        ("in_bounds", "in bounds", ""),
    ],
}


def real_images(archive: Path, per_class: int, split: str = "test") -> tuple[Tensor, Tensor]:
    """The first images of every class: (N, 3, 32, 32) float32 in [0, 1], (N,) labels, in a fixed mixed order.

    archive: tar of SPLIT/CLASS/NNNN.jpg, or the folder that holds cifar10-jpeg.tar.xz.
    """
    import numpy
    from PIL import Image

    if archive.is_dir():
        archive = archive / "cifar10-jpeg.tar.xz"
    found: dict[str, list[Any]] = {}
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            parts = Path(member.name).parts
            if (
                member.isfile()
                and len(parts) >= 3
                and parts[-3] == split
                and int(Path(parts[-1]).stem) < per_class
            ):
                content = tar.extractfile(member)
                assert content is not None
                image = Image.open(io.BytesIO(content.read())).convert("RGB")
                found.setdefault(parts[-2], []).append(numpy.array(image))
    images = [image for name in sorted(found) for image in found[name]]
    labels = [label for label, name in enumerate(sorted(found)) for _ in found[name]]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).float().div(255)
    x = x[order].contiguous(memory_format=torch.channels_last)
    return x, torch.tensor(labels)[order]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as (N, 3, 32, 32) images: for a machine without real ones."""
    from mwpb_fast.data import Config, load_split, split_indices

    images = load_split(Config(name="digits"), split)
    index, _ = split_indices(images.labels, Config(name="digits", validation=0))
    x = F.interpolate(images.images[index].float().div(255), size=(32, 32)).expand(-1, 3, -1, -1)
    return x.contiguous(memory_format=torch.channels_last), images.labels[index]


def batches(x: Tensor, y: Tensor, size: int = 100) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        yield x[rows], y[rows], torch.arange(start, start + len(y[rows]), device=x.device)


# attack rows --------------------------------------------------------------------------------------------------


def gradient_agreement(reference: Net, fast: Net, x: Tensor, y: Tensor) -> dict[str, float]:
    """Shares of the cross-entropy's input gradient whose sign agrees: of its absolute mass, and by count."""
    mass = agreeing = count = 0.0
    for images, labels, _ in batches(x, y):

        def dlogits(logits: Tensor, labels: Tensor = labels) -> Tensor:
            return (logits.float().softmax(1) - F.one_hot(labels, logits.shape[1])).to(logits.dtype)

        with as_oracle(x.device):
            expected = reference.input_grad(images, dlogits)
        got = fast.input_grad(images, dlogits)
        same = expected.sign() == got.sign()
        mass += expected.abs().sum().item()
        agreeing += expected.abs()[same].sum().item()
        count += same.float().mean().item() * len(images)
    return {"mass_agreeing": agreeing / mass, "signs_agreeing": count / len(x)}


def surroundings(net: Any) -> contextlib.AbstractContextManager[None]:
    """What the trainer puts around a run of the net; the reference runs as the oracle."""
    precision: Precision = net.eager.precision if isinstance(net, TwinNet) else net.precision
    return as_oracle(precision.device) if precision.oracle else precision.mode()


def attack_rows(weights: str, nets: dict[str, Net], x: Tensor, y: Tensor, eps: float) -> list[dict[str, Any]]:
    """One row for each net but the first, the reference, which also judges every adversarial image.

    eps: radius in 255ths.
    """
    attack = pgd.Config(steps=10).build()
    reference = next(iter(nets.values()))
    key = torch.tensor([ops.derive_seed(0, 1)], device=x.device)
    results: dict[str, tuple[Tensor, float, float]] = {}
    for name, net in nets.items():
        images, losses, right = [], [], []
        for clean, labels, index in batches(x, y):
            radius = torch.full((len(clean),), eps / 255, device=x.device)
            with surroundings(net):
                images.append(attack(net, Batch(clean, labels, index), None, radius, cross_entropy, key))
            with as_oracle(x.device):
                logits = reference.logits(images[-1])
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            right.append((logits.argmax(1) == labels).float())
        results[name] = (torch.cat(images), torch.cat(losses).mean().item(), 100 * torch.cat(right).mean().item())
    x_adv, loss, accuracy = next(iter(results.values()))
    rows = []
    for name in itertools.islice(nets, 1, None):
        difference = (results[name][0] - x_adv).abs()
        row: dict[str, Any] = {"kind": "attack", "path": name, "weights": weights, "eps": eps, "images": len(x)}
        row |= {"loss": results[name][1], "reference_loss": loss}
        with surroundings(nets[name]):
            row |= gradient_agreement(reference, nets[name], x, y)
        row |= {
            "difference_max": difference.max().item(),
            "difference_mean": difference.mean().item(),
            "loss_ratio": results[name][1] / loss,
            "robust": results[name][2],
            "reference_robust": accuracy,
            "robust_difference": abs(results[name][2] - accuracy),
        }
        row["in_bounds"] = (
            row["mass_agreeing"] >= BOUNDS["mass_agreeing"]
            and row["loss_ratio"] >= BOUNDS["loss_ratio"]
            and row["robust_difference"] <= BOUNDS["robust_difference"]
        )
        rows.append(row)
        print(
            f"attack   {name:24s} {weights:32s} eps {eps:4g}/255: {row['mass_agreeing']:.4f} of the mass, loss "
            f"{row['loss_ratio']:.4f}, {row['robust_difference']:.2f} points apart, in bounds: {row['in_bounds']}",
            flush=True,
        )
    return rows


def default_weights() -> Path | None:
    """The robust ResNet-18 that comes with pyautoattack, where that is installed."""
    spec = find_spec("pyautoattack")
    found = Path(spec.origin).parent / "examples" / "model_test.pt" if spec and spec.origin else None
    return found if found and found.exists() else None


def trained_models(
    o: argparse.Namespace, device: torch.device, x: Tensor, y: Tensor, parts: Parts
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Models with weights worth attacking, by name, and what is missing."""
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    if o.weights is None or o.no_weights:
        skipped["weights"] = "--no-weights" if o.no_weights else "no --weights, and pyautoattack is not installed"
    else:
        model = build_model(o.model, num_classes=10)
        load_weights(model, read_checkpoint(o.weights))
        found[f"{o.model} {o.weights.name}"] = model.to(device).eval()
    if o.train_steps:
        model = build_model(o.train_model, num_classes=10).to(device)
        state = parts.get("weights", lambda: loss_curve("at", 0, ORACLE, x, y, o)[1].state_dict())
        model.load_state_dict(state)
        found[f"{o.train_model} after {o.train_steps} steps of AT"] = model.eval()
    return found, skipped


def attack_paths(device: torch.device) -> list[tuple[str, torch.dtype, bool]]:
    """Name, number type, and whether the attack is on the twin; what this machine computes in hardware."""
    low = [] if emulated(torch.bfloat16, device) else [torch.bfloat16]
    low += [torch.float16] if device.type == "cuda" else []
    return [
        (f"{kind} {str(dtype).removeprefix('torch.')}", dtype, kind == "twin")
        for kind, dtypes in (("twin", [torch.float32, *low]), ("autocast", low))
        for dtype in dtypes
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--archive", type=Path, help="tar of train|test/CLASS/NNNN.jpg")
    parser.add_argument("--model", default="resnet-18")
    parser.add_argument("--weights", type=Path, default=default_weights(), help="default: pyautoattack's example")
    parser.add_argument("--no-weights", action="store_true", help="attack the model trained here alone")
    parser.add_argument("--per-class", type=int, default=100, help="test images of each class")
    parser.add_argument("--eps", nargs="*", type=float, default=[8, 1, 0.5], help="radii in 255ths")
    parser.add_argument("--train-model", default="smallresnet-8")
    parser.add_argument("--train-steps", type=int, default=200, help="0 leaves the training rows out")
    parser.add_argument("--train-batch", type=int, default=64)
    parser.add_argument("--attack-steps", type=int, default=10, help="of the training rows")
    parser.add_argument("--objectives", nargs="*", default=OBJECTIVES)
    parser.add_argument("--seeds", type=int, default=3)
    o = parser.parse_args(arguments)
    parts = Parts(o.json, {k: str(v) for k, v in vars(o).items()})
    device = settled(o).device
    if o.archive is None:
        (x, y), (train_x, train_y) = digits("test"), digits("train")
        x, y = x[: 10 * o.per_class], y[: 10 * o.per_class]
    else:
        x, y = real_images(o.archive, o.per_class)
        train_x, train_y = real_images(o.archive, 500, "train")
    x, y, train_x, train_y = (t.to(device) for t in (x, y, train_x, train_y))
    models, skipped = trained_models(o, device, train_x, train_y, parts)
    objectives = list(o.objectives) if o.train_steps else []
    names = [*(f"{name} {eps}" for name in models for eps in o.eps), *objectives]
    if not names:
        raise SkippedError("nothing to compare: no weights, and no training steps")
    images = "digits" if o.archive is None else o.archive.name
    results = Results(o.json, device, COLUMNS, names, images=images, bounds=BOUNDS, all_in_bounds=None)
    results.skipped |= skipped
    for name, model in models.items():
        if not any(f"{name} {eps}" in results.unfinished for eps in o.eps):
            continue
        nets: dict[str, Net] = {"reference": EagerNet(model, ORACLE.precision(device))}
        for path, dtype, twin in attack_paths(device):
            precision = Precision(device, dtype, torch.channels_last, oracle=False)
            try:
                nets[path] = TwinNet(model, precision, x) if twin else EagerNet(model, precision)
            except Exception as error:  # named, and the others go on
                results.skip(path, error)
        for eps in o.eps:
            part = f"{name} {eps}"
            if part in results.unfinished:
                rows = parts.get(part, lambda n=name, k=nets, e=eps: attack_rows(n, k, x, y, e))  # type: ignore[misc]
                results.put(part, rows)
    if objectives:
        training_rows(train_x, train_y, o, parts, results)
    results.more["all_in_bounds"] = all(row["in_bounds"] for row in results.rows)
    results.write()
    parts.done()


if __name__ == "__main__":
    main()
