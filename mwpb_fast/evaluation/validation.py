"""What a run looks at besides its steps: the accuracy on held-out images, and the radii of the training images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial

import mwpb_kernels as ops
import torch

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.net import EagerNet, module_mode
from mwpb_fast.engine.precision import Precision, unmeasured
from mwpb_fast.evaluation.accuracy import correct
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Attack, Batch, Budget

Batches = Callable[[], Iterable[Batch]]


def accuracies(
    model: torch.nn.Module,
    batches: Batches,
    eps: float,
    epoch: int,
    precision: Precision,
    tick: Callable[..., None],
    fgsm: bool = False,
) -> dict[str, float]:
    """Natural and PGD-10 accuracy in % on images in [0, 1], each of which has its own noise in each epoch; and as
    "validation" the seconds that it took.

    batches: gives them anew at each call. tick: called after each batch. fgsm: also the accuracy under one step as
    long as eps, from the image itself. Modes and random generators are left as they were.
    """
    started, net, device = time.monotonic(), EagerNet(model, precision), precision.device
    attacks = {"robust": pgd.Config(start="uniform").build()}
    if fgsm:
        attacks["fgsm"] = pgd.Config(start="none", steps=1, step_ratio=Fraction(1)).build()
    key = torch.tensor([ops.derive_seed(0, epoch)], device=device)

    def perturb(attack: Attack, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return attack(net, Batch(x, y, index), None, torch.full(y.shape, eps, device=device), cross_entropy, key)

    # whatever the model draws here, training goes on as if there had been no validation, or a part of one
    on_cuda = [device] if device.type == "cuda" else []
    with module_mode(model, training=False), unmeasured(), torch.random.fork_rng(on_cuda):
        flags = {"natural": correct(net, batches(), tick=tick)}
        for name, attack in attacks.items():
            flags[name] = correct(net, batches(), partial(perturb, attack), tick)
    found = {name: 100 * right.float().mean().item() for name, right in flags.items()}
    return found | {"validation": time.monotonic() - started}


def radii(
    model: torch.nn.Module, batches: Batches, budget: Budget, precision: Precision, tick: Callable[..., None]
) -> torch.Tensor:
    """The radius that a budget gives each image, (N,) on the CPU. Arguments as those of `accuracies`."""
    net, found = EagerNet(model, precision), []
    with module_mode(model, training=False), unmeasured():
        for x, y, _ in batches():
            tick()
            found.append(budget(net.logits(x), y).cpu())
    return torch.cat(found)
