"""SPSA: an attack that sees logits only, by simultaneous perturbation (Uesato et al., ICML 2018).

Adam descends the logit margin z_y - max_{j != y} z_j along an estimate of its gradient: the mean over random
sign vectors v of (l(x' + delta v) - l(x' - delta v)) / (2 delta) * v, taken at the current iterate x'. Each
draw is a pair of forward passes. Images are attacked one at a time, each with directions of its own, which are a
function of the seed, the image's index and the iteration: the result does not depend on the other images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mwpb_fast.evaluation.accuracy import predicted
from mwpb_fast.system.lazy import ops, torch

STREAM = 100  # of the counter-based noise; those of the fused ops are below
DECAY, DECAY_SQUARED, TINY = 0.9, 0.999, 1e-8  # Adam's own defaults

Model = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class SPSA:
    """pairs: draws of an iteration, of two forward passes each. delta: how far they reach. learning_rate,
    iterations: of Adam, from the image itself. The iterate is projected to the linf ball and to [0, 1] after each
    step; the points of a pair may lie delta outside."""

    pairs: int = 256
    iterations: int = 100
    delta: float = 0.001
    learning_rate: float = 0.01

    @property
    def forwards(self) -> int:
        """Images sent through the model for one image, at most."""
        return 1 + self.iterations * (2 * self.pairs + 1)

    def attack(
        self,
        model: Model,
        x: torch.Tensor,
        y: torch.Tensor,
        index: torch.Tensor,
        *,
        eps: float,
        seed: int,
        batch_size: int = 250,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adversarial images like x, and (B,) int64: the classes predicted there, -1 for none.

        model: images (n, C, H, W) float32 to logits (n, classes), in eval mode. x: (B, C, H, W) float32 in [0, 1].
        y, index: (B,) int64, the labels and what numbers the images in their data set. batch_size: images at
        once. An image is left at the first iterate that the model gets wrong; at once where that is x.
        """
        x_adv, classes = x.clone(), y.clone()
        with torch.no_grad():
            for i, number in enumerate(index.tolist()):
                x_adv[i], classes[i] = self._one(model, x[i], int(y[i]), number, eps, seed, batch_size)
        return x_adv, classes

    def _one(
        self, model: Model, x: torch.Tensor, y: int, number: int, eps: float, seed: int, batch_size: int
    ) -> tuple[torch.Tensor, int]:
        low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        x_adv, mean, square = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        for t in range(1, self.iterations + 1):
            if (found := int(predicted(model(x_adv[None])))) != y:
                return x_adv, found
            v = self.directions(x, number, t, seed)
            gradient = self.gradient(lambda points: margin(model(points), y), x_adv, v, batch_size)
            mean.lerp_(gradient, 1 - DECAY)
            square.lerp_(gradient * gradient, 1 - DECAY_SQUARED)
            scale = (square / (1 - DECAY_SQUARED**t)).sqrt_().add_(TINY)
            x_adv = x_adv - self.learning_rate / (1 - DECAY**t) * mean / scale
            x_adv = torch.minimum(torch.maximum(x_adv, low), high)
        return x_adv, int(predicted(model(x_adv[None])))

    def directions(self, x: torch.Tensor, number: int, iteration: int, seed: int) -> torch.Tensor:
        """Sign vectors (pairs, *x.shape) of x's type for the image of that number at that iteration."""
        index = torch.tensor([number], device=x.device)
        key = torch.tensor([ops.derive_seed(seed, iteration)], device=x.device)
        count = self.pairs * x.numel()
        words = ops.philox_words(index, key, STREAM, math.ceil(count / 128)).reshape(-1, 1)
        bits = (words >> torch.arange(32, device=x.device)) & 1
        return (2 * bits.reshape(-1)[:count] - 1).to(x.dtype).view(self.pairs, *x.shape)

    def gradient(
        self,
        loss: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        v: torch.Tensor,
        batch_size: int = 250,
    ) -> torch.Tensor:
        """The estimate of loss's gradient at x, like x, from the sign vectors v (pairs, *x.shape).

        loss: points (n, *x.shape) -> (n,).
        """
        total = torch.zeros_like(x)
        for part in v.split(max(1, batch_size // 2)):
            values = loss(torch.cat((x + self.delta * part, x - self.delta * part)))
            slope = (values[: len(part)] - values[len(part) :]) / (2 * self.delta)
            total += torch.tensordot(slope.to(x.dtype), part, dims=1)
        return total / len(v)


def margin(logits: torch.Tensor, y: int) -> torch.Tensor:
    """(n,) logit margin z_y - max_{j != y} z_j of logits (n, classes): negative where the prediction is wrong."""
    others = logits.clone()
    others[:, y] = -math.inf
    return logits[:, y] - others.amax(1)
