"""The ledger of a start: what an attack on a net changes against the model in full float32, on a few images.

`bench/equivalence.py` has the whole one, with the same metrics and bounds. How many images are looked at follows
from the model's operations and never from the clock, so that two starts come to the same figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property

import mwpb_kernels as ops
import torch
import torch.nn.functional as F

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.net import EagerNet, crafting, module_mode
from mwpb_fast.engine.precision import Precision, full_float32
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Batch, Net

# least share of the input gradient's mass, least ratio of losses
BOUNDS = {"mass_agreeing": 0.995, "loss_ratio": 0.99}
LOGITS = 0.1  # greatest distance, of their norm: roundings give 0.02, a wrong kernel 1
BUDGET = {"cpu": 1e10, "cuda": 2e12}  # operations of a forward pass of all images that are looked at
FEWEST, MOST = 4, {"cpu": 32, "cuda": 128}  # images


class Ledger:
    """row(net) on some images of `batch` under the model's weights of now.

    eps: radius of the linf attack. mode: the attack's, as `Step` has it; running statistics are left alone.
    """

    def __init__(self, model: torch.nn.Module, precision: Precision, batch: Batch, eps: float, mode: str) -> None:
        count = looked_at(model, batch.x, precision.device)
        self.batch = Batch(*(t[:count] for t in batch))
        self.model, self.eps = model, eps
        self.mode = "eval" if mode == "eval" else "batch"
        layout = precision.memory_format
        self._reference = EagerNet(model, Precision(precision.device, torch.float32, layout, oracle=False))

    def share(self, net: Net) -> float:
        """Share of the input gradient's absolute mass whose sign agrees with the reference's."""
        net.refresh()
        got, expected = self.gradient(net), self._gradient
        mass = expected.abs().sum()
        agreeing = expected.abs()[expected.sign() == got.sign()].sum()
        return 1.0 if mass == 0 else (agreeing / mass).item()

    def gradient(self, net: Net) -> torch.Tensor:
        """The cross-entropy's gradient at the images: one step of an attack."""
        x, y, _ = self.batch

        def dlogits(logits: torch.Tensor) -> torch.Tensor:
            return cross_entropy(logits, None, y)

        with crafting(self.model, self.mode):
            return net.input_grad(x, dlogits)

    def row(self, net: Net) -> dict[str, float]:
        """Shares and ratios against the reference; `breach` judges them."""
        share, (images, logits) = self.share(net), self._attack(net)
        expected, loss = self._expected
        apart = torch.linalg.vector_norm(logits.float() - expected.float())
        return {
            "mass_agreeing": share,
            "loss_ratio": self._loss(images) / max(loss, 1e-30),
            "logits_apart": (apart / torch.linalg.vector_norm(expected.float()).clamp_min(1e-30)).item(),
            "images": len(images),
        }

    @cached_property
    def _gradient(self) -> torch.Tensor:
        with as_reference():
            return self.gradient(self._reference)

    @cached_property
    def _expected(self) -> tuple[torch.Tensor, float]:
        """Logits, and the loss after the attack."""
        with as_reference():
            images, logits = self._attack(self._reference)
        return logits, self._loss(images)

    def _attack(self, net: Net) -> tuple[torch.Tensor, torch.Tensor]:
        """Images after PGD-10, and the natural images' logits."""
        x, y, _ = self.batch
        radius = torch.full(y.shape, self.eps, device=x.device)
        key = torch.tensor([ops.derive_seed(0, 1)], device=x.device)
        with crafting(self.model, self.mode):
            images = pgd.Config(steps=10).build()(net, self.batch, None, radius, cross_entropy, key)
            return images, net.logits(x)

    def _loss(self, images: torch.Tensor) -> float:
        with as_reference(), crafting(self.model, self.mode):
            return F.cross_entropy(self._reference.logits(images).float(), self.batch.y).item()


@contextlib.contextmanager
def as_reference() -> Iterator[None]:
    """Inside the block what is computed in float32 is the reference."""
    with full_float32(), ops.force_reference():
        yield


def breach(row: dict[str, float]) -> str:
    """Which bound a row is out of; empty where it is in all of them. What is no number is out of bounds."""
    for name, least in BOUNDS.items():
        if not row.get(name, least) >= least:
            return f"{name.replace('_', ' ')} {row[name]:.4f}, less than {least}"
    if not row.get("logits_apart", 0.0) <= LOGITS:
        return f"logits {row['logits_apart']:.3f} of their norm apart, more than {LOGITS}"
    return ""


def operations(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Of a forward pass of one image, two for each multiplication. x: (B, C, H, W) on the model's device."""
    from torch.utils.flop_counter import FlopCounterMode

    with module_mode(model, training=False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    return max(1, counter.get_total_flops())


def looked_at(model: torch.nn.Module, x: torch.Tensor, device: torch.device) -> int:
    """How many images of a batch."""
    affordable = int(BUDGET[device.type] / operations(model, x))
    return min(len(x), MOST[device.type], max(FEWEST, affordable))
