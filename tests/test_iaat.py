"""IAAT: the table of updates on a model whose robust radii are known, warm-up, memory, step sizes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mwpb_kernels as ops
import pytest
import torch

from mwpb_fast.attacks import adaptive, pgd
from mwpb_fast.config import PrecisionConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Batch

CPU = make_precision(PrecisionConfig(device="cpu"))
KEY = torch.tensor([ops.derive_seed(1, 2)])


class Half(torch.nn.Module):
    """Two classes; class 0 as long as the mean pixel exceeds 1/2: x withstands any radius below mean(x) - 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(50.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack((z, torch.zeros_like(z)), 1)


def images(*withstand: float) -> torch.Tensor:
    """Images that withstand so many 255ths; a negative number is classified wrong as it is."""
    return (0.5 + torch.tensor(withstand) / 255).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def attack_of(remembered: float, count: int = 8, epoch: int = 11, **options: Any) -> adaptive.Adaptive:
    attack = adaptive.Config(**options).build()
    attack.remember(count, torch.device("cpu"))
    attack.memory["radius"].fill_(remembered / 255)
    return attack.in_epoch(epoch)


def look(
    attack: adaptive.Adaptive, x: torch.Tensor, index: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_adv and the radius that was used, in 255ths."""
    y = torch.zeros(len(x), dtype=torch.int64)
    notes: dict[str, torch.Tensor] = {}
    index = torch.arange(len(x)) if index is None else index
    budget = torch.full((len(x),), 8 / 255)
    x_adv = attack(EagerNet(Half(), CPU), Batch(x, y, index), None, budget, cross_entropy, KEY, notes)
    return x_adv, 255 * notes["radius"]


def test_the_table_of_updates() -> None:
    """e = 4: withstands the larger radius 4.19; its own 4.00; neither 3.81; natural image wrong 3.60."""
    attack = attack_of(4)
    x = images(8, 5, 3, -1)
    x_adv, radius = look(attack, x, torch.tensor([6, 2, 0, 3]))
    torch.testing.assert_close(radius, torch.tensor([4.19, 4.00, 3.81, 3.60]), rtol=0, atol=1e-4)
    memory = 255 * attack.memory["radius"]
    torch.testing.assert_close(memory[torch.tensor([6, 2, 0, 3])], radius, rtol=0, atol=1e-5)
    assert (memory[torch.tensor([1, 4, 5, 7])] == memory[1]).all()
    # the training attack runs in the updated radius, and on this model goes to its edge
    torch.testing.assert_close(255 * (x_adv - x).abs().flatten(1).amax(1), radius, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("withstand", "expected"), [(0.5, 0.9), (-1.0, 0.9), (9.0, 1.19)])
def test_a_radius_does_not_go_below_zero(withstand: float, expected: float) -> None:
    """e = 1 fails both: e - 1.9 < 0 counts as 0, .1 * 0 + .9 * 1."""
    assert look(attack_of(1), images(withstand))[1].item() == pytest.approx(expected, abs=1e-4)


def test_smoothing_and_growth_are_the_configurations() -> None:
    attack = attack_of(4, growth=Fraction(3, 255), smoothing=0.5)
    radius = look(attack, images(8, 5, 3, -1))[1]
    torch.testing.assert_close(radius, torch.tensor([5.5, 4.0, 2.5, 2.0]), rtol=0, atol=1e-4)


def test_radii_follow_what_images_withstand() -> None:
    """From nothing, hundreds of looks later each radius is where its image just fails, within a growth."""
    x, attack = images(3, 6, 12, -1), attack_of(0)
    for _ in range(300):
        radius = look(attack, x)[1]
    assert ((radius[:3] - torch.tensor([3.0, 6.0, 12.0])).abs() <= 1.9).all()
    assert radius[3] == 0


def test_the_warm_up_overwrites_the_memory_with_the_budgets_radius_where_right() -> None:
    base = adaptive.Config(warmup_epochs=2).build()
    base.remember(3, torch.device("cpu"))
    assert (base.memory["radius"] == 0).all()
    base.memory["radius"].fill_(0.3)
    x = images(20, 3, -1)
    x_adv, radius = look(base.in_epoch(2), x)
    torch.testing.assert_close(radius, torch.tensor([8.0, 8.0, 0.0]))
    torch.testing.assert_close(255 * base.memory["radius"], radius)  # the epoch's attack shares the memory
    assert torch.equal(x_adv[2], x[2])
    assert look(base.in_epoch(3), x)[1][0].item() == pytest.approx(8.19, abs=1e-4)


def test_steps_are_a_fifth_of_the_radius_but_not_below_two() -> None:
    plain = adaptive.Config().build().pgd
    sizes = 255 * plain.step_size(torch.tensor([0.0, 5.0, 10.0, 20.0]) / 255)
    torch.testing.assert_close(sizes, torch.tensor([2.0, 2.0, 2.0, 4.0]))
    assert (plain.config.steps, plain.config.start) == (10, "uniform")


def test_probes_and_training_attack_start_apart() -> None:
    """Three attacks in a step, each from noise of its own; the third as plain PGD would start with that key."""
    attack, starts = attack_of(4), []
    plain = attack.pgd

    class Recorder:
        def __call__(self, net: Any, batch: Batch, clean: Any, radius: torch.Tensor, *rest: Any) -> Any:
            start = plain.start(batch.x, torch.full_like(radius, 4 / 255), rest[1], batch.index)
            starts.append((start - batch.x, radius.clone()))
            return plain(net, batch, clean, radius, *rest)

    attack.pgd = Recorder()  # type: ignore[assignment]
    x = images(8, 5, 3, -1)
    look(attack, x)
    noise = [n for n, _ in starts]
    assert len(noise) == 3
    for one in range(3):
        for other in range(one):
            assert abs(torch.corrcoef(torch.stack((noise[one].flatten(), noise[other].flatten())))[0, 1]) < 0.3
    usual = pgd.Config(start="uniform").build().start(x, torch.full((4,), 4 / 255), KEY, torch.arange(4)) - x
    assert torch.equal(noise[2], usual)
    radii = [255 * r for _, r in starts]
    torch.testing.assert_close(radii[0], torch.full((4,), 4.0))
    torch.testing.assert_close(radii[1], torch.full((4,), 5.9))
    torch.testing.assert_close(radii[2], torch.tensor([4.19, 4.00, 3.81, 3.60]), rtol=0, atol=1e-4)


def test_the_memory_belongs_to_the_image_in_whatever_order() -> None:
    x, index, y = images(8, 5, 3, -1, 7, 1), torch.tensor([5, 0, 4, 2, 7, 3]), torch.zeros(6, dtype=torch.int64)
    net, budget = EagerNet(Half(), CPU), torch.full((6,), 8 / 255)
    whole, parts = attack_of(4), attack_of(4)
    for _ in range(3):
        whole(net, Batch(x, y, index), None, budget, cross_entropy, KEY)
        order = torch.randperm(6)
        for part in (order[:2], order[2:]):
            parts(net, Batch(x[part], y[part], index[part]), None, budget[part], cross_entropy, KEY)
    assert torch.equal(whole.memory["radius"], parts.memory["radius"])


def test_the_probes_ascend_the_objectives_loss() -> None:
    """An inner loss that goes nowhere: the image withstands everything but noise."""

    def still(logits: torch.Tensor, clean: Any, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits)

    notes: dict[str, torch.Tensor] = {}
    y = torch.zeros(1, dtype=torch.int64)
    batch = Batch(images(3), y, index=torch.zeros_like(y))
    attack_of(4)(EagerNet(Half(), CPU), batch, None, torch.ones(1), still, KEY, notes)
    assert 255 * notes["radius"].item() == pytest.approx(4.19, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"warmup_epochs": -1}, {"growth": Fraction(-1, 255)}, {"smoothing": 1.5}, {"smoothing": -0.1}],
)
def test_settings_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        adaptive.Config(**options)
