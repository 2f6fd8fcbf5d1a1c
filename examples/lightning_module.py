"""The ops in a Lightning module: margin radii, and PGD in them; beside the same module without the ops."""

import logging

import lightning
import mwpb_kernels as ops
import plain
import torch
from beside import SMALL, beside, digits, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

COUNT, STEPS = (64, 2) if SMALL else (1536, 24)
EPS, ALPHA = 16 / 255, 0.58
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Plain(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def radius(self, logits: Tensor, y: Tensor) -> Tensor:
        return plain.margin_radius(logits, y, EPS, ALPHA)

    def move(self, x_adv: Tensor, gradient: Tensor, x: Tensor, radius: Tensor) -> Tensor:
        return plain.linf_step(x_adv, gradient, x, radius)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        x, y = batch
        radius, x_adv = self.radius(self.layers(x).detach(), y), x.clone()
        for _ in range(5):
            loss = nn.functional.cross_entropy(self.layers(x_adv.requires_grad_()), y)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = self.move(x_adv.detach(), gradient, x, radius)
        return nn.functional.cross_entropy(self.layers(x_adv), y)


class WithOps(Plain):
    def radius(self, logits: Tensor, y: Tensor) -> Tensor:
        return ops.margin_radius(logits, y, EPS, ALPHA)

    def move(self, x_adv: Tensor, gradient: Tensor, x: Tensor, radius: Tensor) -> Tensor:
        return ops.linf_step_(x_adv, gradient, x, radius, radius / 4)


def trained(kind: type[Plain]) -> Tensor:
    torch.manual_seed(0)
    module, off = kind(), dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = lightning.Trainer(max_steps=STEPS, devices=1, enable_model_summary=False, **off)
    trainer.fit(module, DataLoader(TensorDataset(*digits(COUNT)), batch_size=32))
    return nn.utils.parameters_to_vector(module.parameters()).detach()


one, other = beside({"plain": lambda: trained(Plain), "with the ops": lambda: trained(WithOps)}, rounds=5)
same(one, other, within=1e-3, share=0.99)
