"""The ledger of the fast paths: what each changes against the eager float32 reference, on real images.

    python bench/equivalence.py --archive cifar10-jpeg.tar.xz --json bench/results/equivalence-cpu.json

Attack rows, for trained weights: share of the input gradient's signs, by count and by absolute mass, that agree
with the reference's; difference of the adversarial images; loss after the attack relative to the reference's;
robust accuracy, at radii where the model holds and where it does not. Training rows, for AT, TRADES and MART:
distance of the loss curve from the reference's with the same seed, beside the distances between the reference's
own seeds.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch
import torch.nn.functional as F
from attack import commit
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.attacks.inner import cross_entropy
from mwpb_fast.config import OptimConfig, load
from mwpb_fast.engine.net import EagerNet, Net
from mwpb_fast.engine.precision import Precision, cpu_has_bf16
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.log import environment
from mwpb_fast.models import build_model, load_weights, read_checkpoint
from mwpb_fast.optim import make_optimizer
from mwpb_fast.step import Step

# least share of mass, least ratio of losses, greatest difference of robust accuracy in points
BOUNDS = {"mass_agreeing": 0.995, "loss_ratio": 0.99, "robust_difference": 0.3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OBJECTIVES = ("at", "trades", "mart")


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

        expected, got = (net.input_grad(images, dlogits) for net in (reference, fast))
        same = expected.sign() == got.sign()
        mass += expected.abs().sum().item()
        agreeing += expected.abs()[same].sum().item()
        count += same.float().mean().item() * len(images)
    return {"mass_agreeing": agreeing / mass, "signs_agreeing": count / len(x)}


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
            images.append(attack(net, clean, labels, None, radius, cross_entropy, key, index))
            logits = reference.logits(images[-1])
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            right.append((logits.argmax(1) == labels).float())
        results[name] = (
            torch.cat(images),
            torch.cat(losses).mean().item(),
            100 * torch.cat(right).mean().item(),
        )
    x_adv, loss, accuracy = next(iter(results.values()))
    rows = []
    for name in itertools.islice(nets, 1, None):
        difference = (results[name][0] - x_adv).abs()
        row: dict[str, Any] = {"path": name, "weights": weights, "eps": eps, "images": len(x)}
        row |= {"loss": results[name][1], "reference_loss": loss}
        row |= gradient_agreement(reference, nets[name], x, y)
        row |= {
            "difference_max": difference.max().item(),
            "difference_mean": difference.mean().item(),
            "loss_ratio": results[name][1] / loss,
            "robust": results[name][2],
            "reference_robust": accuracy,
            "robust_difference": abs(results[name][2] - accuracy),
        }
        row["within_bounds"] = (
            row["mass_agreeing"] >= BOUNDS["mass_agreeing"]
            and row["loss_ratio"] >= BOUNDS["loss_ratio"]
            and row["robust_difference"] <= BOUNDS["robust_difference"]
        )
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


# training rows ------------------------------------------------------------------------------------------------


def loss_curve(
    objective: str, seed: int, dtype: torch.dtype | None, x: Tensor, y: Tensor, o: argparse.Namespace
) -> tuple[Tensor, nn.Module]:
    """(steps,) losses of the margin-weighted form of `objective`, and the model that it leaves; dtype: of the
    twin, None for eager float32."""
    torch.manual_seed(seed)
    layout = torch.channels_last
    model = build_model(o.train_model, num_classes=10).to(device=x.device, memory_format=layout)  # type: ignore[call-overload]
    precision = Precision(x.device, torch.float32, layout, oracle=False)
    net: Any = EagerNet(model, precision) if dtype is None else TwinNet(model, precision, x[:2], dtype)
    step = Step(
        model=model,
        net=net,
        attack=pgd.Config(steps=10).build(),
        objective=load("objectives", objective).Config().build(),
        perturb=load("perturbations", "none").Config().build(),
        optimizer=make_optimizer(model, OptimConfig(lr=0.05)),
        precision=precision,
    )
    budget = load("budgets", "margin").Config().build()
    order = torch.Generator().manual_seed(seed)
    key = torch.tensor([ops.derive_seed(seed, 1)], device=x.device)
    losses = []
    for _ in range(o.train_steps):
        rows = torch.randperm(len(x), generator=order)[: o.train_batch].to(x.device)
        if dtype is not None:
            net.refresh()
        images = x[rows].contiguous(memory_format=layout)
        losses.append(step(images, y[rows], rows, key, budget).loss)
    return torch.stack(losses).cpu(), model.eval()


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of two curves, each first averaged over windows of ten steps."""
    width = min(10, len(a))
    smooth = [c[: len(c) // width * width].view(-1, width).mean(1) for c in (a, b)]
    return (smooth[0] - smooth[1]).square().mean().sqrt().item()


def training_rows(
    paths: dict[str, torch.dtype], x: Tensor, y: Tensor, o: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    for objective in o.objectives:
        curves = [loss_curve(objective, seed, None, x, y, o)[0] for seed in range(o.seeds)]
        between = [distance(a, b) for a, b in itertools.combinations(curves, 2)]
        for name, dtype in paths.items():
            fast, _ = loss_curve(objective, 0, dtype, x, y, o)
            row: dict[str, Any] = {
                "path": name,
                "objective": objective,
                "steps": o.train_steps,
                "distance": distance(fast, curves[0]),
                "seed_distances": between,
                "last_losses": [c[-10:].mean().item() for c in (fast, *curves)],
            }
            row["within_bounds"] = row["distance"] <= max(between)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def default_weights() -> Path | None:
    """The robust ResNet-18 that comes with pyautoattack, where that is installed."""
    spec = find_spec("pyautoattack")
    found = Path(spec.origin).parent / "examples" / "model_test.pt" if spec and spec.origin else None
    return found if found and found.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="tar of train|test/CLASS/NNNN.jpg")
    parser.add_argument("--model", default="resnet-18")
    parser.add_argument("--weights", type=Path, default=default_weights(), help="default: pyautoattack's example")
    parser.add_argument("--per-class", type=int, default=100, help="test images of each class")
    parser.add_argument("--eps", nargs="*", type=float, default=[8, 1, 0.5], help="radii in 255ths")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train-model", default="smallresnet-8")
    parser.add_argument("--train-steps", type=int, default=200, help="0 leaves the training rows out")
    parser.add_argument("--train-batch", type=int, default=64)
    parser.add_argument("--objectives", nargs="*", default=OBJECTIVES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    device = torch.device(o.device)
    names = ["fp32"] + (["bf16"] if device.type == "cuda" or cpu_has_bf16() else [])
    paths = {f"twin {n}": DTYPES[n] for n in names + (["fp16"] if device.type == "cuda" else [])}
    result: dict[str, Any] = {
        "environment": environment(device) | {"commit": commit()},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "bounds": BOUNDS,
        "attack": [],
        "training": [],
        "skipped": {},
    }
    x, y = (t.to(device) for t in real_images(o.archive, o.per_class))
    train_x, train_y = (t.to(device) for t in real_images(o.archive, 500, "train"))
    trained: dict[str, nn.Module] = {}
    if o.weights is None:
        result["skipped"]["weights"] = "no --weights, and pyautoattack is not installed"
    else:
        model = build_model(o.model, num_classes=10)
        load_weights(model, read_checkpoint(o.weights))
        trained[f"{o.model} {o.weights.name}"] = model.to(device).eval()
    if o.train_steps:
        name = f"{o.train_model} after {o.train_steps} steps of AT"
        trained[name] = loss_curve("at", 0, None, train_x, train_y, o)[1]
    oracle = Precision(device, torch.float32, torch.contiguous_format, oracle=True)
    for name, model in trained.items():
        nets: dict[str, Net] = {"reference": EagerNet(model, oracle)}
        nets |= {path: TwinNet(model, oracle, x, dtype) for path, dtype in paths.items()}
        for eps in o.eps:
            result["attack"] += attack_rows(name, nets, x, y, eps)
    if o.train_steps:
        result["training"] = training_rows(paths, train_x, train_y, o)
    if o.json:
        o.json.parent.mkdir(parents=True, exist_ok=True)
        o.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
