"""The active test of an evaluation: an adversarial example is planted in each ball, and the attack must find it.

After Zimmermann, Brendel, Tramèr and Carlini (NeurIPS 2022): the model's classes are replaced, for each image, by
two of a linear readout of its logits, chosen so that the image is of the first class and one known point of its
ball of the second. An attack that leaves images right there cannot be believed where it leaves them right at all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.evaluation.accuracy import right
from mwpb_fast.evaluation.contract import AttackSetting, EvaluationAttack, Outcome, check_ball
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Batch
from mwpb_fast.system.lazy import ops, torch

TILES = (1, 2, 4, 8)  # a network hardly notices noise of single pixels; constant tiles move its logits further.
# Those larger than a quarter of the image are left out, since the same few corners would be drawn again and again.
LOWEST = -1e30  # stands for -inf at a class that is ruled out, of which no difference can be taken


@dataclass(frozen=True)
class Planted:
    """steps: of the PGD that searches. corners: the planted one is the best of so many random ones."""

    steps: int = 20
    corners: int = 64

    def run(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        index: torch.Tensor,
        setting: AttackSetting,
    ) -> Outcome:
        """values["planted"]: 1 where there is an example to be found, else 0. values["found"]: whether PGD finds
        it, and values["chance"], whether as many random corners do; NaN where none is planted."""
        size = setting.batch_size
        parts = [
            self._batch(model, *batch, setting) for batch in zip(x.split(size), index.split(size), strict=True)
        ]
        planted, found, chance = torch.cat(parts, 1).cpu()
        nothing = torch.where(planted == 1, 0.0, float("nan"))
        values = {"planted": planted, "found": found + nothing, "chance": chance + nothing}
        return Outcome(found == 0, values=values)

    def _batch(
        self, model: torch.nn.Module, x: torch.Tensor, index: torch.Tensor, setting: AttackSetting
    ) -> torch.Tensor:
        """(3, B): planted, found, chance."""
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        readout, point = self._plant(model, x, index, setting)
        net = EagerNet(readout, setting.precision)
        planted = right(net.logits(x), first) & right(net.logits(point), first + 1)
        key = torch.tensor([ops.derive_seed(setting.seed)], device=x.device)
        attack = pgd.Config(steps=self.steps, start="uniform", step_size=setting.step_size).build()
        radius = torch.full(first.shape, float(setting.eps), device=x.device)
        x_adv = attack(net, Batch(x, first, index), None, radius, cross_entropy, key)
        check_ball(x_adv, x, setting)
        found, chance = right(net.logits(x_adv), first + 1), torch.zeros_like(planted)
        for number in range(self.corners, self.corners + self.steps + 1):
            chance |= right(net.logits(corner(x, index, setting, number)), first + 1)
        return torch.stack([planted, found & planted, chance & planted]).float()

    def _plant(
        self, model: torch.nn.Module, x: torch.Tensor, index: torch.Tensor, setting: AttackSetting
    ) -> tuple[Readout, torch.Tensor]:
        """The readout and the corners (B, C, H, W) that are of its second class: those that move the logits
        furthest. The readout looks along that move, and draws the line halfway to the next of the corners."""
        net = EagerNet(model, setting.precision)
        natural = net.logits(x).clamp_min(LOWEST)
        points = (corner(x, index, setting, number) for number in range(self.corners))
        moves, point, furthest = [], x, torch.zeros(len(x), device=x.device)
        for candidate in points:
            moves.append(net.logits(candidate).clamp_min(LOWEST) - natural)
            length = moves[-1].norm(dim=1)
            point = torch.where((length > furthest)[:, None, None, None], candidate, point)
            furthest = torch.maximum(furthest, length)
        moved = torch.stack(moves)
        best = moved.gather(0, moved.norm(dim=2).argmax(0)[None, :, None].expand(1, *natural.shape))[0]
        direction = torch.nn.functional.normalize(best, dim=1)
        reached = (moved * direction).sum(2)
        top = reached.amax(0)
        # a small image has few corners, and the furthest may have been drawn twice
        short = torch.where(reached < 0.999 * top, reached, 0).amax(0)
        return Readout(model, natural, direction, (top + short) / 2), point


class Readout(torch.nn.Module):
    """Two classes for each image of a batch: the logits' move away from natural (B, K) along direction (B, K), of
    unit length so that what is too steep or too flat to be attacked stays so, short of level (B,) or beyond."""

    def __init__(
        self, model: torch.nn.Module, natural: torch.Tensor, direction: torch.Tensor, level: torch.Tensor
    ) -> None:
        super().__init__()
        self.inside, self.natural, self.direction, self.level = model, natural, direction, level
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        move = self.inside(x).clamp_min(LOWEST) - self.natural
        score = (move * self.direction).sum(1) - self.level
        return torch.stack([torch.zeros_like(score), score], 1)


def corner(x: torch.Tensor, index: torch.Tensor, setting: AttackSetting, number: int) -> torch.Tensor:
    """One of the random corners of each image's linf ball, in [0, 1]: each tile of pixels goes up or down."""
    key = torch.tensor([ops.derive_seed(setting.seed, 1, number)], device=x.device)
    sides = [side for side in TILES if side == 1 or 4 * side <= min(x.shape[2:])]
    middle, side = torch.full_like(x, 0.5), sides[number % len(sides)]
    noise = ops.uniform_start(middle, torch.full((len(x),), 0.5, device=x.device), key, index) - middle
    tiles = noise.sign()[:, :, ::side, ::side].repeat_interleave(side, 2).repeat_interleave(side, 3)
    return (x + float(setting.eps) * tiles[:, :, : x.shape[2], : x.shape[3]]).clamp(0, 1)


def planted(test: Planted = Planted()) -> EvaluationAttack:
    """The active test on the evaluation's `costly_subset`."""
    forwards = 2 * (test.steps + 1) + test.corners + 4
    return EvaluationAttack(test.run, forwards, stepped=True, costly=True, parameters=asdict(test))
