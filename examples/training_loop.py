"""Adversarial training in a loop of one's own: margin radii, TRADES and AWP are the project's."""

import sys
from fractions import Fraction

import torch
from sklearn.datasets import load_digits
from torch import nn

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import margin
from mwpb_fast.config import PrecisionConfig
from mwpb_fast.engine.net import EagerNet, crafting
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch
from mwpb_fast.objectives import trades
from mwpb_fast.perturbations import awp

EPOCHS, COUNT = (2, 256) if "--small" in sys.argv else (12, 1536)

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[:COUNT]
target = torch.tensor(labels)[:COUNT]

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
net = EagerNet(model, make_precision(PrecisionConfig(device="cpu")))  # the model as attacks see it

budget = margin.Config(eps=Fraction(16, 255), alpha=0.42).build()
attack = pgd.Config(steps=5).build()
objective = trades.Config(beta=6.0).build()
perturb = awp.Config(gamma=0.005).build()

means = []
for epoch in range(1, EPOCHS + 1):
    losses = []
    for index in torch.randperm(COUNT).split(64):
        x, y = images[index], target[index]
        key = torch.tensor([epoch])  # the seed of the attack's noise, which is a function of it and of each index
        with crafting(model, "eval"):
            clean = net.logits(x)
            radius = budget(clean, y)
            x_adv = attack(net, Batch(x, y, index), clean, radius, objective.inner, key)
        model.train()
        with perturb(model, lambda: objective.outer(model, x, x_adv, y)):  # noqa: B023, called before the next
            loss = objective.outer(model, x, x_adv, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    means.append(torch.stack(losses).mean().item())
    spread = f"radii {255 * radius.min():.1f} to {255 * radius.max():.1f} of 255"
    print(f"epoch {epoch}: loss {means[-1]:.3f}, {spread}")
assert means[-1] < means[0]
