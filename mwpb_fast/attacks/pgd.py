"""Projected gradient descent in per-sample balls: Algorithm 1, lines 8 to 15 (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from mwpb_fast.method import Attack, AttackConfig, Batch, Inner, Net, Notes
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    """norm: of the balls. steps: K. step_ratio: step size as a share of the sample's radius, unless step_size
    fixes it; warmup_step_size fixes it for the first warmup_epochs epochs alone. start: Gaussian noise of standard
    deviation sigma (TRADES), uniform in the ball, or the image itself. count_correct: note as "hits" which share
    of the K iterates, each before its step, is classified right (GAIRAT's kappa / K)."""

    norm: Literal["linf", "l2"] = "linf"
    steps: int = 10
    step_ratio: Fraction = Fraction(1, 4)
    step_size: Fraction | None = None
    start: Literal["gaussian", "uniform", "none"] = "gaussian"
    sigma: float = 0.001
    count_correct: bool = False
    warmup_step_size: Fraction | None = None
    warmup_epochs: int = 0

    @property
    def gives(self) -> frozenset[str]:
        """Names of the notes that the attack makes."""
        return frozenset({"hits"} if self.count_correct else ())

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, not {self.steps}")
        if self.sigma < 0:
            raise ValueError(f"sigma must not be negative, not {self.sigma}")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, not {self.warmup_epochs}")
        if self.count_correct and self.steps == 0:
            raise ValueError("count_correct counts over the steps, of which there are none")

    def build(self) -> PGD:
        return PGD(self)


@dataclass(frozen=True)
class PGD(Attack):
    """attack(net, batch, clean, radius, inner, key, notes) -> x_adv, in each sample's ball and in [0, 1]."""

    config: Config

    def in_epoch(self, epoch: int) -> PGD:
        """What serves in the `epoch`th epoch, counted from 1."""
        first = self.config.warmup_step_size
        if first is None:
            return self
        now = first if epoch <= self.config.warmup_epochs else self.config.step_size
        return PGD(replace(self.config, step_size=now, warmup_step_size=None, warmup_epochs=0))

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
        """Arguments and result as `mwpb_fast.method.Attack` has them. notes: takes "hits", (B,) float32."""
        x, y, index = batch
        hits = torch.zeros(y.shape, device=y.device)

        def dlogits(logits: torch.Tensor) -> torch.Tensor:
            if self.config.count_correct:
                hits.add_(logits.argmax(1) == y)
            return inner(logits, clean, y)

        with torch.no_grad():
            x_adv = self.start(x, radius, key, index)
            step_size = self.step_size(radius)
            for _ in range(self.config.steps):
                if self.config.norm == "linf":
                    net.linf_step_(x_adv, dlogits, x, radius, step_size)
                else:
                    ops.l2_step_(x_adv, net.input_grad(x_adv, dlogits), x, radius, step_size)
        if notes is not None and self.config.count_correct:
            notes["hits"] = hits / self.config.steps
        return x_adv

    def start(self, x: torch.Tensor, radius: torch.Tensor, key: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The first iterate: a new tensor, clamped to [0, 1]."""
        if self.config.start == "gaussian":
            return ops.gaussian_start(x, self.config.sigma, key, index)
        if self.config.start == "uniform":
            uniform = ops.uniform_start if self.config.norm == "linf" else ops.l2_start
            return uniform(x, radius, key, index)
        return x.clone()

    def step_size(self, radius: torch.Tensor) -> torch.Tensor:
        """Step of each sample, (B,)."""
        if self.config.step_size is not None:
            return torch.full_like(radius, float(self.config.step_size))
        return radius * float(self.config.step_ratio)
