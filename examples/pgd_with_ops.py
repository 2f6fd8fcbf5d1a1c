"""PGD in a ball of each image's own, with the fused ops and without them: the same attack, timed side by side."""

import sys
import time

import mwpb_kernels as ops
import torch
from torch import Tensor, nn

SMALL = "--small" in sys.argv
BATCH, WIDTH, STEPS = (8, 4, 3) if SMALL else (128, 32, 10)


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, radius: Tensor) -> Tensor:
    eps = radius.view(-1, 1, 1, 1)
    x_adv = start.clone()
    for _ in range(STEPS):
        x_adv.requires_grad_()
        loss = nn.functional.cross_entropy(model(x_adv), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + eps / 4 * gradient.sign()
        x_adv = torch.maximum(torch.minimum(x_adv, x + eps), x - eps).clamp(0, 1)
    return x_adv


def fused_pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, radius: Tensor) -> Tensor:
    x_adv = start.clone()
    for _ in range(STEPS):
        leaf = x_adv.detach().requires_grad_()
        logits = model(leaf)
        (gradient,) = torch.autograd.grad(logits, leaf, ops.ce_grad(logits.detach(), y))
        ops.linf_step_(x_adv, gradient, x, radius, radius / 4)  # sign, step, ball and pixel range in one pass
    return x_adv


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * WIDTH, 10)
)
x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
with torch.no_grad():
    radius = ops.margin_radius(model(x), y, 8 / 255, 0.58)  # exp(alpha * margin) * eps
start = ops.gaussian_start(x, 0.001, torch.tensor([ops.derive_seed(0)]), torch.arange(BATCH))

losses = {}
for attack in (plain_pgd, fused_pgd):
    began = time.perf_counter()
    x_adv = attack(model, x, y, start, radius)
    seconds = time.perf_counter() - began
    assert ((x_adv - x).abs().flatten(1).amax(1) <= radius + 1e-6).all()
    with torch.no_grad():
        losses[attack.__name__] = nn.functional.cross_entropy(model(x_adv), y).item()
    print(f"{attack.__name__}: {1e3 * seconds:.1f} ms, loss {losses[attack.__name__]:.5f}")
assert abs(losses["plain_pgd"] - losses["fused_pgd"]) < 1e-3 * losses["plain_pgd"]
