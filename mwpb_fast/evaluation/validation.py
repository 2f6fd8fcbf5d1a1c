"""What a run looks at besides its steps: the accuracy on held-out images, and the radii of the training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import torch

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.net import EagerNet, module_mode
from mwpb_fast.engine.precision import Precision, unmeasured
from mwpb_fast.evaluation.accuracy import correct
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Batch, Budget
from mwpb_fast.runs import checkpoint
from mwpb_fast.system import ranks

Batches = Callable[[], Iterable[Batch]]


def right(
    model: torch.nn.Module,
    batches: Batches,
    eps: float,
    epoch: int,
    precision: Precision,
    tick: Callable[..., None],
) -> torch.Tensor:
    """How many images in [0, 1], each of which has its own noise in each epoch, are right as they are, how many
    under PGD-10, and how many there are, (3,) float32 on the CPU.

    batches: gives them anew at each call. tick: called after each batch. Modes and random generators are left as
    they were.
    """
    net, device = EagerNet(model, precision), precision.device
    attack = pgd.Config(start="uniform").build()
    key = torch.tensor([ops.derive_seed(0, epoch)], device=device)

    def perturb(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return attack(net, Batch(x, y, index), None, torch.full(y.shape, eps, device=device), cross_entropy, key)

    # whatever the model draws here, training goes on as if there had been no validation, or a part of one
    on_cuda = [device] if device.type == "cuda" else []
    with module_mode(model, training=False), unmeasured(), torch.random.fork_rng(on_cuda):
        natural = correct(net, batches(), tick=tick)
        robust = correct(net, batches(), perturb, tick)
    return torch.stack([natural.float().sum(), robust.float().sum(), torch.tensor(float(len(natural)))])


def accuracies(counts: torch.Tensor) -> dict[str, float]:
    """Natural and robust accuracy in %, of what `right` counts, over all processes."""
    natural, robust, images = ranks.total(counts)
    return {"natural": 100 * (natural / images).item(), "robust": 100 * (robust / images).item()}


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


def radii_of_best(
    folder: Path,
    model: torch.nn.Module,
    index: torch.Tensor,
    batches: Batches,
    budget: Budget,
    precision: Precision,
    tick: Callable[..., None],
) -> dict[str, Any]:
    """Epoch of a run's best checkpoint, whose weights are loaded into `model`, and the radii of the training
    images at `index` under it: those that the attack remembers, else as `radii`'s."""
    found = checkpoint.read_newest(folder / "checkpoints", "best")
    assert found is not None
    model.load_state_dict(found[1]["model"])
    remembered = found[1].get("memory", {}).get("attack", {}).get("radius")
    if remembered is not None:  # by an attack that finds every image's radius itself
        values = remembered[index]
    else:
        values = radii(model, batches, budget, precision, tick)
    return {"epoch": found[1]["epoch"], "radii": values.tolist()}
