"""A step of TRADES' attack under torch.compile, the ops in one graph with the rest; beside plain PyTorch."""

import mwpb_kernels as ops
import plain
import torch
from beside import DEVICE, SMALL, beside, same
from torch import Tensor, nn

BATCH = 4 if SMALL else 128

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
model.requires_grad_(False).to(DEVICE)  # the attack wants the gradient of the images alone
x, y = torch.rand(BATCH, 3, 32, 32, device=DEVICE), torch.randint(10, (BATCH,), device=DEVICE)
natural = model(x)
radius = ops.margin_radius(natural, y, 8 / 255, 0.58)
start = (x + 0.01 * torch.randn_like(x)).clamp(0, 1)


def plain_step(x_adv: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda x_adv: plain.kl_div(natural, model(x_adv)))(x_adv)
    return plain.linf_step(x_adv, gradient, x, radius)


def step_with_ops(x_adv: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda x_adv: ops.kl_div(natural, model(x_adv)).sum())(x_adv)  # it has a derivative
    return ops.linf_step_(x_adv.clone(), gradient, x, radius, radius / 4)


plain_compiled = torch.compile(plain_step, fullgraph=True)
compiled_with_ops = torch.compile(step_with_ops, fullgraph=True)
ways = {
    "plain": lambda: plain_step(start),
    "plain, compiled": lambda: plain_compiled(start),
    "ops": lambda: step_with_ops(start),
    "ops, compiled": lambda: compiled_with_ops(start),
}
first, *others = beside(ways, rounds=20)
for other in others:
    same(first, other, within=1e-6, share=0.99)
