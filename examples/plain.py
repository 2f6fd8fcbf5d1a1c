"""In plain PyTorch what the ops do: what the examples are compared with."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def margin_radius(logits: Tensor, y: Tensor, eps: float, alpha: float) -> Tensor:
    """(B,) exp(alpha * m) * eps; m is the probability of the true class less the largest of the others."""
    p = logits.softmax(1)
    margin = p.gather(1, y[:, None])[:, 0] - p.scatter(1, y[:, None], 0).amax(1)
    return eps * torch.exp(alpha * margin)


def linf_step(x_adv: Tensor, gradient: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """A step of a quarter of each image's radius by the sign, back into its ball and into [0, 1]."""
    eps = radius.view(-1, 1, 1, 1)
    return torch.maximum(torch.minimum(x_adv + eps / 4 * gradient.sign(), x + eps), x - eps).clamp(0, 1)


def entropy(logits: Tensor) -> Tensor:
    """(B,) of softmax(logits), in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def kl_div(natural: Tensor, adversarial: Tensor) -> Tensor:
    """The sum over the batch of KL(softmax(natural) || softmax(adversarial))."""
    return F.kl_div(adversarial.log_softmax(1), natural.softmax(1), reduction="sum")


def trades(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """Cross-entropy at the natural images, and beta times the divergence from there to the adversarial ones."""
    natural, adversarial = model(x), model(x_adv)
    return F.cross_entropy(natural, y) + beta * kl_div(natural, adversarial) / len(x)


@contextlib.contextmanager
def awp(model: nn.Module, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """The block runs with each kernel w at w + gamma * ||w|| * d / ||d||, d the loss's gradient."""
    kernels = [w for w in model.parameters() if w.dim() > 1]
    gradients = torch.autograd.grad(loss(), kernels)
    moved = [gamma * w.detach().norm() * d / d.norm() for w, d in zip(kernels, gradients, strict=True)]
    for w, v in zip(kernels, moved, strict=True):
        w.data += v
    yield
    for w, v in zip(kernels, moved, strict=True):
        w.data -= v
