"""AN-PGD: adversarial examples at each sample's own margin (Ding et al., "MMA training", ICLR 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from mwpb_fast.attacks import pgd
from mwpb_fast.method import Attack, AttackConfig, Batch, Inner, Net, Notes
from mwpb_fast.system.lazy import torch

# The search goes on to so many times d_max, so that what reaches d_max is told from what does not.
ABOVE = 1.05


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    """steps: of PGD in the remembered radius, from a uniform start. stride: those steps together, in radii.
    search_steps: halvings of the bisection. floor: least radius that PGD is given, and what is remembered of a
    sample that was not seen yet. d_max is the radius that the budget gives."""

    steps: int = 10
    stride: Fraction = Fraction(5, 2)
    search_steps: int = 10
    floor: Fraction = Fraction(1, 200)
    gives: ClassVar[frozenset[str]] = frozenset({"radius", "counted"})
    own_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.search_steps < 1:
            raise ValueError(f"steps and search_steps must be at least 1, not {self.steps}, {self.search_steps}")
        if self.stride <= 0 or self.floor <= 0:
            raise ValueError(f"stride and floor must be positive, not {self.stride} and {self.floor}")

    def build(self) -> ANPGD:
        return ANPGD(self)


class ANPGD(Attack):
    """attack(net, batch, clean, d_max, inner, key, notes) -> x_adv, in [0, 1].

    S+ are the samples with SLM(x) < 0, SLM being the soft logit margin below. For them PGD ascends SLM in the
    radius remembered for the sample, which gives a direction u, and bisection finds the d in [0, 1.05 d_max] at
    which SLM(x + d u) = 0, images clamped; x_adv is x + d u, clamped, and d is remembered. All others keep x, and
    0 is remembered. d is off by at most 1.05 d_max / 2^search_steps, where SLM changes sign once along u.

    Notes: "radius", d, and 0 outside S+; "counted" (B,) bool, False for S+ with d >= d_max, whose margin is large
    enough already. d_max may differ from sample to sample: with the margin budget, MWPB-MMA, it is the sample's
    weighted radius.

    Readings, where the authors' code has others: S+ and the bisection see the model in the attack's mode, as PGD
    does (theirs: S+ from the train-mode outputs, bisection in train mode, moving running statistics); x_adv is
    clamped (theirs is not, though its bisection clamps). As theirs: a sample not seen yet has radius .005, the
    floor, and so has one that was outside S+.

    Speed: every sample is attacked and the others masked out, so shapes are fixed, nothing waits for the device
    and a CUDA graph can hold it. twin and bf16 apply in eval mode; in bf16, d is only as exact as the logits.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pgd = pgd.Config(
            steps=config.steps, step_ratio=Fraction(config.stride) / config.steps, start="uniform"
        ).build()
        self.memory: dict[str, torch.Tensor] = {}

    def remember(self, count: int, device: torch.device) -> None:
        """Make room for the radii of `count` training images."""
        self.memory["radius"] = torch.full((count,), float(self.config.floor), device=device)

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
        """Arguments as pgd's; radius is d_max, `inner` is not asked: this attack has its own loss."""
        x, y, index = batch
        with torch.no_grad():
            plus = soft_margin(net.logits(x) if clean is None else clean, y) < 0
            most = ABOVE * radius
            before = torch.minimum(self.memory["radius"][index].clamp_min(float(self.config.floor)), most)
            x_adv = self.pgd(net, batch, None, before, ascend_soft_margin, key)
            direction = (x_adv - x) / (column(before, x) + 1e-12)
            margin = torch.where(plus, self.bisect(net, x, y, direction, before, most), 0.0)
            x_adv = torch.where(column(plus, x), (x + column(margin, x) * direction).clamp(0, 1), x)
            self.memory["radius"][index] = margin
        if notes is not None:
            notes["radius"] = margin
            notes["counted"] = ~plus | (margin < radius)
        return x_adv

    def bisect(
        self,
        net: Net,
        x: torch.Tensor,
        y: torch.Tensor,
        direction: torch.Tensor,
        first: torch.Tensor,
        most: torch.Tensor,
    ) -> torch.Tensor:
        """Where SLM(clamp(x + d * direction)) changes its sign, (B,), searched in [0, most] from d = first on."""
        low, high, d = torch.zeros_like(most), most, first
        for _ in range(self.config.search_steps):
            inside = soft_margin(net.logits((x + column(d, x) * direction).clamp(0, 1)), y) < 0
            low, high = torch.where(inside, d, low), torch.where(inside, high, d)
            d = (low + high) / 2
        return d


def soft_margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SLM = logsumexp_{j != y} z_j - z_y, (B,) float32: below 0 just where the label's probability exceeds 1/2.

    logits: (B, C), C >= 2. y: (B,) int64.
    """
    others, own = _apart(logits, y)
    return torch.logsumexp(others, dim=1) - own


def ascend_soft_margin(logits: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """The inner loss: gradient of the summed SLM at the logits."""
    others, own = _apart(logits, y)
    ones = torch.ones_like(own)[:, None]
    return others.softmax(dim=1).scatter(1, y[:, None], -ones).to(logits.dtype)


def _apart(logits: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = logits if logits.dtype == torch.float64 else logits.float()
    return z.scatter(1, y[:, None], -torch.inf), z.gather(1, y[:, None]).squeeze(1)


def column(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B,) as (B, 1, 1, 1) beside images x."""
    return values.view(-1, *[1] * (x.dim() - 1))
