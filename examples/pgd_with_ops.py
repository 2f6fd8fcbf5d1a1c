"""PGD in a ball of each image's own, with the fused ops and without them: the same attack, timed in turn."""

import mwpb_kernels as ops
import torch
from beside import DEVICE, SMALL, beside, same
from torch import Tensor, nn

BATCH, WIDTH, STEPS = (8, 4, 3) if SMALL else (128, 32, 10)
EPS, ALPHA = 8 / 255, 0.58


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    with torch.no_grad():
        p = model(x).softmax(1)
        margin = p.gather(1, y[:, None]) - p.scatter(1, y[:, None], 0).amax(1, keepdim=True)
        eps = (EPS * torch.exp(ALPHA * margin)).view(-1, 1, 1, 1)
    x_adv = start.clone()
    for _ in range(STEPS):
        x_adv.requires_grad_()
        loss = nn.functional.cross_entropy(model(x_adv), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + eps / 4 * gradient.sign()
        x_adv = torch.maximum(torch.minimum(x_adv, x + eps), x - eps).clamp(0, 1)
    return x_adv


def fused_pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    with torch.no_grad():
        radius = ops.margin_radius(model(x), y, EPS, ALPHA)
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
).to(DEVICE)
model.requires_grad_(False)  # the attack wants the gradient of the images alone
x, y = torch.rand(BATCH, 3, 32, 32, device=DEVICE), torch.randint(10, (BATCH,), device=DEVICE)
key, index = torch.tensor([ops.derive_seed(0)], device=DEVICE), torch.arange(BATCH, device=DEVICE)
start = ops.gaussian_start(x, 0.001, key, index)

ways = {"plain": lambda: plain_pgd(model, x, y, start), "with the ops": lambda: fused_pgd(model, x, y, start)}
plain, fused = beside(ways)
same(plain, fused, within=1e-6, share=0.99)
