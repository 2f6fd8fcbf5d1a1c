"""What a run looks at besides its steps: the accuracy on held-out images, and the radii of the training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path

import mwpb_kernels as ops
import torch

from mwpb_fast.attacks import pgd
from mwpb_fast.config import Config, to_dict
from mwpb_fast.engine.net import EagerNet, module_mode
from mwpb_fast.engine.precision import Precision, unmeasured
from mwpb_fast.evaluation.accuracy import correct
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Attack, Batch, Budget
from mwpb_fast.runs import checkpoint
from mwpb_fast.system import ranks
from mwpb_fast.system.files import to_json, write_atomically

Batches = Callable[[], Iterable[Batch]]


def right(
    model: torch.nn.Module,
    batches: Batches,
    eps: float,
    epoch: int,
    precision: Precision,
    tick: Callable[..., None],
    fgsm: bool = False,
) -> torch.Tensor:
    """How many images in [0, 1], each of which has its own noise in each epoch, are right as they are, how many
    under PGD-10, with fgsm also under one step as long as eps from the image itself, and how many there are,
    (3 or 4,) float32 on the CPU.

    batches: gives them anew at each call. tick: called after each batch. Modes and random generators are left as
    they were.
    """
    net, device = EagerNet(model, precision), precision.device
    attacks = [pgd.Config(start="uniform").build()]
    if fgsm:
        attacks.append(pgd.Config(start="none", steps=1, step_ratio=Fraction(1)).build())
    key = torch.tensor([ops.derive_seed(0, epoch)], device=device)

    def perturb(attack: Attack, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return attack(net, Batch(x, y, index), None, torch.full(y.shape, eps, device=device), cross_entropy, key)

    # whatever the model draws here, training goes on as if there had been no validation, or a part of one
    on_cuda = [device] if device.type == "cuda" else []
    with module_mode(model, training=False), unmeasured(), torch.random.fork_rng(on_cuda):
        flags = [correct(net, batches(), tick=tick)]
        flags += [correct(net, batches(), partial(perturb, attack), tick) for attack in attacks]
    return torch.stack([*(found.float().sum() for found in flags), torch.tensor(float(len(flags[0])))])


def accuracies(counts: torch.Tensor) -> dict[str, float]:
    """Natural and robust accuracy in %, and that under FGSM where it was asked for, of what `right` counts, over
    all processes."""
    *found, images = ranks.total(counts)
    return {name: 100 * (n / images).item() for name, n in zip(("natural", "robust", "fgsm"), found, strict=False)}


def radii(
    model: torch.nn.Module, batches: Batches, budget: Budget, precision: Precision, tick: Callable[..., None]
) -> torch.Tensor:
    """The radius that a budget gives each image, (N,) on the CPU. Arguments as those of `right`."""
    net, found = EagerNet(model, precision), []
    with module_mode(model, training=False), unmeasured():
        for x, y, _ in batches():
            tick()
            found.append(budget(net.logits(x), y).cpu())
    return torch.cat(found)


def write_radii(
    folder: Path,
    config: Config,
    model: torch.nn.Module,
    index: torch.Tensor,
    batches: Batches,
    budget: Budget,
    precision: Precision,
    tick: Callable[..., None],
) -> None:
    """radii.json of a run: epoch of its best checkpoint, whose weights are loaded into `model`, and the radii of
    the training images at `index` under it: those that the attack remembers, else as `radii`'s."""
    found = checkpoint.read_newest(folder / "checkpoints", "best")
    assert found is not None
    model.load_state_dict((state := found[1])["model"])
    remembered = state.get("memory", {}).get("attack", {}).get("radius")
    if remembered is not None:  # by an attack that finds every image's radius itself
        values = remembered[index]
    else:
        values = radii(model, batches, budget, precision, tick)
    content = {"epoch": state["epoch"], "budget": to_dict(config)["budget"], "radii": values.tolist()}
    write_atomically(folder / "radii.json", to_json(content).encode())
