"""The squeeze pair: in each ball the two points whose predictions differ most (Li et al., "Squeeze training for
adversarial robustness", ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from mwpb_fast.attacks import pgd
from mwpb_fast.attacks._noise import other_key
from mwpb_fast.method import Attack, AttackConfig, Batch, Inner, Net, Notes
from mwpb_fast.system.lazy import ops, torch


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    """steps: K. step_ratio: step size as a share of the sample's radius, unless step_size fixes it. sigma: of the
    two independent Gaussian starts."""

    steps: int = 10
    step_ratio: Fraction = Fraction(1, 4)
    step_size: Fraction | None = None
    sigma: float = 0.001
    gives: ClassVar[frozenset[str]] = frozenset({"second"})
    own_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, not {self.steps}")
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive, or the pair would never part; not {self.sigma}")

    def build(self) -> Squeeze:
        plain = pgd.Config(
            steps=self.steps, step_ratio=self.step_ratio, step_size=self.step_size, sigma=self.sigma
        )
        return Squeeze(plain.build())


@dataclass(frozen=True)
class Squeeze(Attack):
    """attack(net, batch, clean, radius, inner, key, notes) -> x_a; notes "second": x_c, like x.

    Every step looks at x, x_c and x_a, takes for each sample the one with the lowest label probability ("upper")
    and the one with the highest ("lower"), and moves both along the sign of their own gradient of
    KL(P_lower || P_upper) + KL(P_upper || P_lower), the first distribution of each KL fixed. Upper becomes x_a,
    lower x_c. Both stay in the sample's ball and in [0, 1]; the radius may differ from sample to sample (MWPB-ST).

    `inner(logits of one, logits of the other, y)` is that gradient, as objective st has it. The authors craft on
    batch statistics that leave the running ones alone: attack_mode "batch". The three images keep batches of
    their own, as theirs do, because batch statistics would differ in a mixture.

    Speed: three passes forward and backward a step; the first is of x itself, which may be chosen too. bf16
    applies; twin with attack_mode eval alone, since batch statistics cannot be folded. Nothing waits for the
    device, and a CUDA graph can hold the whole attack, though not a single pass: the three are nested, and three
    graphs live at a time.
    """

    pgd: pgd.PGD  # It lends its starts and step sizes; its loop is not run.

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
        """Arguments and result as pgd's; `clean` is not asked."""
        x, y, index = batch
        with torch.no_grad():
            x_a = self.pgd.start(x, radius, key, index)
            x_c = self.pgd.start(x, radius, other_key(key, 1), index)
            step_size = self.pgd.step_size(radius)
            for _ in range(self.pgd.config.steps):
                points = [x, x_c, x_a]
                gradients, upper, lower = self.gradients(net, points, y, inner)
                x_a, x_c = pick(points, upper), pick(points, lower)
                ops.linf_step_(x_a, pick(gradients, upper), x, radius, step_size)
                ops.linf_step_(x_c, pick(gradients, lower), x, radius, step_size)
        if notes is not None:
            notes["second"] = x_c
        return x_a

    def gradients(
        self, net: Net, points: list[torch.Tensor], y: torch.Tensor, inner: Inner
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Each batch's input gradient of the loss between upper and lower, and the choice of both, (B,) int64."""
        logits: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        seeds: list[torch.Tensor] = []
        choice: list[torch.Tensor] = []

        def dlogits(mine: torch.Tensor) -> torch.Tensor:
            # What a point ascends depends on all logits, so the further passes run within the first ones'.
            number = len(logits)
            logits.append(mine)
            if number + 1 < len(points):
                gradients.append(net.input_grad(points[number + 1], dlogits))
            else:
                choice.extend(select(logits, y))
                seeds.extend(pulls(logits, choice[0], choice[1], y, inner))
            return seeds[number]

        gradients.append(net.input_grad(points[0], dlogits))
        return gradients[::-1], choice[0], choice[1]


def select(logits: list[torch.Tensor], y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower: which of the batches of logits, each (B, C), gives the label the lowest and the highest
    probability; (B,) int64 each, the first at a tie."""
    # In half precision more probabilities would tie, so those of half-precision logits are float32.
    exact = [z.detach() if z.dtype == torch.float64 else z.detach().float() for z in logits]
    own = torch.stack([z.log_softmax(dim=1).gather(1, y[:, None]).squeeze(1) for z in exact])
    return own.argmin(dim=0), own.argmax(dim=0)


def pulls(
    logits: list[torch.Tensor], upper: torch.Tensor, lower: torch.Tensor, y: torch.Tensor, inner: Inner
) -> list[torch.Tensor]:
    """The gradient at each batch's logits of the loss between upper and lower: 0 for samples not chosen."""
    high, low = pick(logits, upper), pick(logits, lower)
    up, down = inner(high, low, y), inner(low, high, y)
    zero = torch.zeros_like(up)
    return [
        torch.where((upper == number)[:, None], up, zero) + torch.where((lower == number)[:, None], down, zero)
        for number in range(len(logits))
    ]


def pick(batches: list[torch.Tensor], choice: torch.Tensor) -> torch.Tensor:
    """Sample by sample the batch that `choice` (B,) names: a new tensor, through which gradients flow."""
    shape = (-1, *[1] * (batches[0].dim() - 1))
    result = batches[0]
    for number, batch in enumerate(batches[1:], start=1):
        result = torch.where((choice == number).view(shape), batch, result)
    return result
