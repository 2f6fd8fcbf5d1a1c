"""A training loop of one's own: margin radii, attack, TRADES and AWP are the project's; beside plain PyTorch."""

from fractions import Fraction

import plain
import torch
from beside import DEVICE, SMALL, beside, digits, same
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import margin
from mwpb_fast.config import PrecisionConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch
from mwpb_fast.objectives import trades
from mwpb_fast.perturbations import awp

COUNT, BETA, GAMMA = 64 if SMALL else 1536, 6.0, 0.005
budget = margin.Config(eps=Fraction(16, 255), alpha=0.42).build()
attack = pgd.Config(steps=5, start="none").build()
objective, perturb = trades.Config(beta=BETA).build(), awp.Config(gamma=GAMMA).build()


def ours(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, index: Tensor) -> None:
    net = EagerNet(model, make_precision(PrecisionConfig(device=DEVICE)))  # the model as attacks see it
    clean, key = net.logits(x), torch.tensor([0], device=DEVICE)  # the seed of an attack's noise, here none
    x_adv = attack(net, Batch(x, y, index), clean, budget(clean, y), objective.inner, key)
    with perturb(model, lambda: objective.outer(model, x, x_adv, y)):  # in it the weights stand elsewhere
        optimizer.zero_grad()
        objective.outer(model, x, x_adv, y).backward()
        optimizer.step()


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, index: Tensor) -> None:
    clean, x_adv = model(x).detach(), x.clone()
    radius = plain.margin_radius(clean, y, 16 / 255, 0.42)
    for _ in range(5):
        (gradient,) = torch.autograd.grad(plain.kl_div(clean, model(x_adv.requires_grad_())), x_adv)
        x_adv = plain.linf_step(x_adv.detach(), gradient, x, radius)

    with plain.awp(model, lambda: plain.trades(model, x, x_adv, y, BETA), GAMMA):
        optimizer.zero_grad()
        plain.trades(model, x, x_adv, y, BETA).backward()
        optimizer.step()


def trained(plainly: bool) -> Tensor:
    torch.manual_seed(0)
    x, y = digits(COUNT)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for index in torch.randperm(COUNT).to(DEVICE).split(32):
        (by_hand if plainly else ours)(model, optimizer, x[index], y[index], index)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


one, other = beside({"plain": lambda: trained(True), "with ours": lambda: trained(False)}, rounds=5)
same(one, other, within=1e-3, share=0.99)
