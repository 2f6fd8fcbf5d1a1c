"""IAAT: PGD in a radius that follows each training image's own robustness (Balaji, Goldstein and Hoffman,
"Instance adaptive adversarial training", 2019)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from mwpb_fast.attacks import pgd
from mwpb_fast.attacks._noise import other_key
from mwpb_fast.method import Attack, AttackConfig, Batch, Inner, Net, Notes
from mwpb_fast.system.lazy import torch


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    """steps: K, of the probes and of the training attack. growth: how far a radius is tried to grow or shrunk at a
    time. smoothing: share of the new radius in what is remembered. warmup_epochs: so many first epochs attack in
    the budget's radius what is classified right, and remember that. step_ratio: step size as a share of the
    sample's radius; min_step: the least step."""

    steps: int = 10
    growth: Fraction = Fraction(19, 2550)
    smoothing: float = 0.1
    warmup_epochs: int = 10
    step_ratio: Fraction = Fraction(1, 5)
    min_step: Fraction = Fraction(2, 255)
    gives: ClassVar[frozenset[str]] = frozenset({"radius"})
    own_radius: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup_epochs < 0:
            raise ValueError(
                f"steps must be at least 1 and warmup_epochs not negative, not {self.steps}, {self.warmup_epochs}"
            )
        if self.growth < 0 or not 0 <= self.smoothing <= 1:
            raise ValueError(
                f"growth must not be negative and smoothing in [0, 1], not {self.growth}, {self.smoothing}"
            )

    def build(self) -> Adaptive:
        return Adaptive(self)


class Adaptive(Attack):
    """attack(net, batch, clean, radius, inner, key, notes) -> x_adv, in [0, 1].

    After the warm-up: with e the radius remembered for the sample and g the growth, PGD in e and in e + g tells
    whether the sample withstands them. The new radius is e + g if it withstands the larger; else e if it
    withstands e; else e - g; 0 if the natural image is classified wrong; not below 0. e becomes
    smoothing * new + (1 - smoothing) * e, is remembered, and is the radius of the training attack, which is a
    third PGD from a start of its own: the authors' code returns the updated, smoothed radius and attacks in it.
    In the warm-up the radius is the budget's where the natural image is classified right, else 0; it replaces what
    was remembered, which begins at 0. Probes and training attack ascend the objective's inner loss.

    Notes: "radius". The radius is found here, so budget margin is refused: it would have no say.

    The authors run all of it in train mode: attack_mode "train". Speed: three attacks and a natural pass a step
    after the warm-up. In eval mode twin applies; bf16 does in every mode; shapes are fixed and nothing waits for
    the device, so a CUDA graph can hold it, one for the warm-up and one for what follows.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.warm = False
        self.pgd = _AtLeast(
            pgd.Config(steps=config.steps, step_ratio=config.step_ratio, start="uniform"), float(config.min_step)
        )
        self.memory: dict[str, torch.Tensor] = {}
        self._first = copy.copy(self)  # The copy shares this memory, which is one object.
        self._first.warm = True

    def remember(self, count: int, device: torch.device) -> None:
        """Make room for the radii of `count` training images."""
        self.memory["radius"] = torch.zeros(count, device=device)

    def in_epoch(self, epoch: int) -> Adaptive:
        """The attack as it is in the `epoch`th epoch, counted from 1: the same object throughout a phase."""
        return self._first if epoch <= self.config.warmup_epochs else self

    def __call__(
        self,
        net: Net,
        batch: Batch,
        clean: torch.Tensor | None,
        radius: torch.Tensor,
        inner: Inner,
        key: torch.Tensor,
        notes: Notes | None = None,
    ) -> torch.Tensor:
        """Arguments and result as pgd's; radius is that of the warm-up."""
        x, y, index = batch
        with torch.no_grad():
            natural = right(net.logits(x) if clean is None else clean, y)
            if self.warm:
                found = radius * natural
            else:
                before = self.memory["radius"][index]

                def withstands(e: torch.Tensor, number: int) -> torch.Tensor:
                    probe = self.pgd(net, batch, clean, e, inner, other_key(key, number))
                    return right(net.logits(probe), y)

                growth = float(self.config.growth)
                current, larger = withstands(before, 1), withstands(before + growth, 2)
                found = self.updated(before, natural, current, larger)
            self.memory["radius"][index] = found
            x_adv = self.pgd(net, batch, clean, found, inner, key)
        if notes is not None:
            notes["radius"] = found
        return x_adv

    def updated(
        self, before: torch.Tensor, natural: torch.Tensor, current: torch.Tensor, larger: torch.Tensor
    ) -> torch.Tensor:
        """The radii after one look, (B,). natural, current, larger: (B,) bool, whether the sample is classified
        right as it is and under attack in its radius and in the larger one."""
        growth, smoothing = float(self.config.growth), self.config.smoothing
        kept = torch.where(current, before, before - growth)
        new = torch.where(natural, torch.where(larger, before + growth, kept), 0.0).clamp_min(0.0)
        return smoothing * new + (1 - smoothing) * before


@dataclass(frozen=True)
class _AtLeast(pgd.PGD):
    """PGD whose step is a share of the radius, but not below `min_step`."""

    min_step: float

    def step_size(self, radius: torch.Tensor) -> torch.Tensor:
        """Step of each sample, (B,)."""
        return super().step_size(radius).clamp_min(self.min_step)


def right(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B,) bool: whether the label has the largest logit."""
    return logits.argmax(dim=1) == y
