"""The attacks that bench/attack.py compares with: other packages', and loops written from their description.

Each takes a model and the number of steps, and gives attack(x, y) -> x_adv: steps of 2/255 in the l-infinity
ball of 8/255. A package that is missing or broken raises SkippedError, as does bf16 where the processor emulates
it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ceilings import refuse_emulated
from measure import SkippedError
from torch import Tensor, nn

from mwpb_fast.system.optional import attempt

EPS, STEP = 8 / 255, 2 / 255
Attack = Callable[[Tensor, Tensor], Tensor]


class Autocast(nn.Module):
    """What a user adds around a model to have bf16: autocast inside, float32 logits outside."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        refuse_emulated(torch.bfloat16, device)
        self.model, self.device_type = model, device.type

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device_type, torch.bfloat16):
            logits = self.model(x)
        return logits.float()


def package(name: str) -> Any:
    """The module of a peer. Raises SkippedError where it is missing or broken."""
    found = attempt(name)
    if found.module is None:
        raise SkippedError(f"{name.split('.')[0]} {found.why}")
    return found.module


def torchattacks_pgd(model: nn.Module, steps: int) -> Attack:
    torchattacks = package("torchattacks")
    return torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=True)


def foolbox_pgd(model: nn.Module, steps: int) -> Attack:
    foolbox = package("foolbox")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    return lambda x, y: attack(wrapped, x, y, epsilons=EPS)[1]


def cleverhans_pgd(model: nn.Module, steps: int) -> Attack:
    pgd = package("cleverhans.torch.attacks.projected_gradient_descent").projected_gradient_descent
    bounds = {"clip_min": 0.0, "clip_max": 1.0, "sanity_checks": False}
    return lambda x, y: pgd(model, x, EPS, STEP, steps, float("inf"), y=y, **bounds)


def trades_style(model: nn.Module, steps: int) -> Attack:
    """The loop of TRADES' code: Gaussian start, gradient of the KL divergence to the natural distribution with
    respect to the image alone. The natural forward pass is done once here, not in every step."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        x_adv = x + 0.001 * torch.randn_like(x)
        with torch.no_grad():
            natural = F.softmax(model(x), dim=1)
        for _ in range(steps):
            x_adv.requires_grad_()
            loss = F.kl_div(F.log_softmax(model(x_adv), dim=1), natural, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + STEP * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        return x_adv

    return attack


def fast_adversarial_style(model: nn.Module, steps: int) -> Attack:
    """The loop of fast_adversarial's PGD training: uniform start, loss.backward(), which also computes the
    gradients of the weights, and an update of delta in place."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        delta = torch.empty_like(x).uniform_(-EPS, EPS)
        delta = torch.max(torch.min(delta, 1 - x), -x).requires_grad_()
        for _ in range(steps):
            F.cross_entropy(model(x + delta), y).backward()
            assert delta.grad is not None
            moved = (delta.detach() + STEP * delta.grad.sign()).clamp(-EPS, EPS)
            delta.data = torch.max(torch.min(moved, 1 - x), -x)
            delta.grad.zero_()
        model.zero_grad(set_to_none=True)
        return x + delta.detach()

    return attack


PEERS: dict[str, Callable[[nn.Module, int], Attack]] = {
    "torchattacks": torchattacks_pgd,
    "foolbox": foolbox_pgd,
    "cleverhans": cleverhans_pgd,
    "TRADES-style": trades_style,
    "fast_adversarial-style": fast_adversarial_style,
}


def peer(build: Callable[[nn.Module, int], Attack], model: nn.Module, variant: str, steps: int) -> Attack:
    """`build`'s attack on a copy of the model, which is wrapped as the variant says."""
    model, device = copy.deepcopy(model), next(model.parameters()).device
    if variant == "as used":
        return build(model, steps)
    wrapped: nn.Module = Autocast(model.to(memory_format=torch.channels_last), device)  # type: ignore[call-overload]
    if "compile" in variant:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]  # it is a module still
    return build(wrapped.eval(), steps)
