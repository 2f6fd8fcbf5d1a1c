"""A budget, an objective, a data set and an op, each one file of own/: trained with, and beside plain PyTorch."""

from fractions import Fraction

import plain
import torch
from beside import DEVICE, SMALL, beside, same
from own import entropy, floored, paired, stripes
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.config import PrecisionConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch, Method
from mwpb_fast.perturbations import none
from mwpb_fast.step import Step

split = stripes.images("own.stripes", "train")
index = torch.arange(64 if SMALL else 1024)
x, y = split.images.to(DEVICE)[index] / 255, split.labels.to(DEVICE)[index]
key = torch.tensor([0], device=DEVICE)  # the seed of an epoch's noise, here none
method = Method(
    budget=floored.Config(eps=Fraction(32, 255), alpha=0.58, floor=0.75).build(),
    attack=pgd.Config(steps=3, start="none").build(),
    objective=paired.Config(weight=2.0).build(),
    perturb=none.Config().build(),
)


def trained(plainly: bool) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    precision = make_precision(PrecisionConfig(device=DEVICE))
    step = Step(model=model, net=EagerNet(model, precision), optimizer=optimizer, precision=precision)
    for part in index.split(64):
        batch = Batch(x[part], y[part], part.to(DEVICE))
        plain_step(model, optimizer, batch) if plainly else step(batch, key, method)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    (x, y, _), loss, x_adv = batch, nn.functional.cross_entropy, batch.x.clone()
    radius = plain.margin_radius(model(x).detach(), y, 32 / 255, 0.58).clamp(min=0.75 * 32 / 255)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(loss(model(x_adv.requires_grad_()), y), x_adv)
        x_adv = plain.linf_step(x_adv.detach(), gradient, x, radius)
    natural, adversarial = model(x), model(x_adv)
    optimizer.zero_grad()
    (loss(adversarial, y) + 2 * plain.kl_div(natural, adversarial) / len(x)).backward()
    optimizer.step()


one, other = beside({"plain": lambda: trained(True), "own parts": lambda: trained(False)}, rounds=5)
same(one, other, within=1e-3, share=0.99)
logits = torch.randn(len(x), 100, device=DEVICE)
one, other = beside({"plain": lambda: plain.entropy(logits), "own op": lambda: entropy.entropy(logits)})
same(one, other, within=1e-5)
