"""One step of an attack under torch.compile, ops included, without a break in the graph; beside the eager step."""

import sys
import time

import mwpb_kernels as ops
import torch
from torch import Tensor, nn

BATCH, ROUNDS = (4, 1) if "--small" in sys.argv else (128, 20)

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
model.requires_grad_(False)  # the attack wants the gradient of the images alone
x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
radius = ops.margin_radius(model(x), y, 8 / 255, 0.58)


def loss(x_adv: Tensor) -> Tensor:
    return ops.kl_div(model(x), model(x_adv)).sum()  # TRADES' inner loss; the op has a derivative


def step(x_adv: Tensor) -> Tensor:
    gradient = torch.func.grad(loss)(x_adv)
    return ops.linf_step_(x_adv.clone(), gradient, x, radius, radius / 4)


compiled = torch.compile(step, fullgraph=True)
start = (x + 0.01 * torch.randn_like(x)).clamp(0, 1)
results = {}
for name, call in (("eager", step), ("compiled", compiled)):
    results[name] = call(start)  # the first call compiles
    began = time.perf_counter()
    for _ in range(ROUNDS):
        call(start)
    print(f"{name}: {1e3 * (time.perf_counter() - began) / ROUNDS:.2f} ms a step")

# a gradient of nearly 0 may have the other sign where it is summed in another order
same = (results["eager"] - results["compiled"]).abs() < 1e-6
assert same.float().mean() > 0.999
