"""MMA: the soft logit margin, AN-PGD where the margin is known, the memory, and the loss."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mwpb_kernels as ops
import pytest
import torch

from mwpb_fast.attacks import anpgd, pgd
from mwpb_fast.config import PrecisionConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch
from mwpb_fast.objectives import mma

CPU = make_precision(PrecisionConfig(device="cpu"))
D_MAX = 32 / 255
BOUND = 1.05 * D_MAX / 2**10  # 1.29e-4
KEY = torch.tensor([ops.derive_seed(1, 2)])


@pytest.mark.parametrize(
    ("z", "expected"), [((2.0, 1.0, 0.0), -0.686738), ((1.0, 0.9, 0.9), 0.593147), ((0.5, 0.5), 0.0)]
)
def test_soft_margin_by_hand(z: tuple[float, ...], expected: float) -> None:
    """The second is classified right and yet positive: SLM < 0 says p_y > 1/2."""
    logits, y = torch.tensor([z]), torch.tensor([0])
    assert anpgd.soft_margin(logits, y).item() == pytest.approx(expected, abs=2e-6)


def test_soft_margin_is_negative_just_where_the_label_has_more_than_half() -> None:
    logits, y = 2 * torch.randn(500, 4), torch.randint(4, (500,))
    p = logits.softmax(1).gather(1, y[:, None]).squeeze(1)
    margin = anpgd.soft_margin(logits, y)
    assert torch.equal(margin < 0, p > 0.5)
    torch.testing.assert_close(margin, ((1 - p) / p).log(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_inner_gradient_is_that_of_the_summed_soft_margin(dtype: torch.dtype) -> None:
    logits, y = torch.randn(6, 5).to(dtype), torch.randint(5, (6,))
    leaf = logits.double().requires_grad_()
    (expected,) = torch.autograd.grad(anpgd.soft_margin(leaf, y).sum(), leaf)
    actual = mma.Config().build().inner(logits, None, y)
    assert actual.dtype == dtype
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=1e-6)


class Half(torch.nn.Module):
    """Two classes, z = (a . (x - offset), 0): the margin of x is a . (x - offset) / |a|_1, exactly."""

    def __init__(self, a: torch.Tensor, offset: float) -> None:
        super().__init__()
        self.a, self.offset = torch.nn.Parameter(a), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = ((x - self.offset) * self.a).flatten(1).sum(1)
        return torch.stack((z, torch.zeros_like(z)), 1)


def half(n: int = 40) -> tuple[Half, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(3, 4, 4, generator=generator)
    # margins between -.02 and twice d_max, far from the ends of the pixel range
    wanted = torch.linspace(-0.02, 2 * D_MAX, n)
    x = 0.4 + wanted.view(-1, 1, 1, 1) * a.sign()
    noise = 0.02 * torch.randn(n, 3, 4, 4, generator=generator)
    x = x + noise - (noise * a).flatten(1).sum(1).view(-1, 1, 1, 1) / a.abs().sum() * a.sign()
    return Half(a, 0.4), x, torch.zeros(n, dtype=torch.int64), wanted


def attack_of(count: int = 64, **options: Any) -> anpgd.ANPGD:
    attack = anpgd.Config(**options).build()
    attack.remember(count, torch.device("cpu"))
    return attack


def test_margins_of_a_linear_model_are_exact_to_the_bisections_bound() -> None:
    model, x, y, margins = half()
    attack, net = attack_of(), EagerNet(model, CPU)
    d_max = torch.full((len(x),), D_MAX)
    notes: dict[str, torch.Tensor] = {}
    index = torch.arange(len(x))
    for _ in range(2):  # from the floor, and from what was remembered
        x_adv = attack(net, Batch(x, y, index), None, d_max, ops.ce_grad, KEY, notes)
        found = notes["radius"]
        reach = margins.clamp(max=1.05 * D_MAX)
        plus = margins > 0
        assert ((found - reach)[plus].abs() <= BOUND + 1e-6).all()
        assert (found[~plus] == 0).all()
        assert torch.equal(x_adv[~plus], x[~plus])
        counted = ~plus | (margins < D_MAX)
        assert torch.equal(notes["counted"], counted)
        assert 3 < (plus & counted).sum() < 39
        assert (~counted).sum() > 3
        near = plus & (margins < D_MAX)
        assert (anpgd.soft_margin(net.logits(x_adv), y)[near].abs() <= BOUND * model.a.abs().sum() + 1e-4).all()
        torch.testing.assert_close((x_adv - x).abs().flatten(1).amax(1), found, rtol=0, atol=1e-6)
    torch.testing.assert_close(attack.memory["radius"][:40], found, rtol=0, atol=0)
    assert (attack.memory["radius"][40:] == torch.tensor(0.005)).all()


def test_each_halving_halves_the_error() -> None:
    model, x, y, margins = half()
    keep = (margins > 0) & (margins < D_MAX)
    for steps in (1, 4, 16):
        attack = attack_of(search_steps=steps)
        notes: dict[str, torch.Tensor] = {}
        attack(
            EagerNet(model, CPU), Batch(x, y, torch.arange(40)), None, torch.full((40,), D_MAX), None, KEY, notes
        )
        error = (notes["radius"] - margins)[keep].abs().max()
        assert error <= 1.05 * D_MAX / 2**steps + 1e-6
        assert steps == 16 or error > 0.05 * D_MAX / 2**steps


def test_d_max_may_differ_from_sample_to_sample() -> None:
    """MWPB-MMA: the margin budget's radius takes the place of the common d_max."""
    model, x, y, margins = half()
    d_max = torch.where(torch.arange(40) % 2 == 0, 0.03, 0.2)
    notes: dict[str, torch.Tensor] = {}
    attack_of()(EagerNet(model, CPU), Batch(x, y, torch.arange(40)), None, d_max, None, KEY, notes)
    plus = margins > 0
    assert torch.equal(notes["counted"], ~plus | (margins < d_max))
    assert notes["counted"][margins < 0].all()
    reach = torch.minimum(margins, 1.05 * d_max)
    assert ((notes["radius"] - reach)[plus].abs() <= 1.05 * d_max[plus] / 2**10 + 1e-6).all()
    attack_of()(EagerNet(model, CPU), Batch(x, y, torch.arange(40)), None, torch.zeros(40), None, KEY, notes)
    assert torch.equal(notes["counted"], ~plus)  # no ball at all: S- is learnt still


def test_images_stay_in_the_pixel_range() -> None:
    """White images of a model that wants them whiter: the ascent is cut at 1, and so is what is trained on."""
    model = Half(-torch.ones(3, 4, 4), 1.05)
    x = torch.full((4, 3, 4, 4), 0.99)
    x[0], x[1] = 0.5, 0.999
    notes: dict[str, torch.Tensor] = {}
    images = Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    x_adv = attack_of()(EagerNet(model, CPU), images, None, torch.full((4,), 0.5), None, KEY, notes)
    assert x_adv.max() <= 1
    assert x_adv.min() >= 0
    assert (x_adv[1:] == 1).any()
    assert not notes["counted"].any()  # within [0, 1] SLM never changes its sign: margins beyond d_max
    torch.testing.assert_close(notes["radius"], torch.full((4,), 0.525), rtol=0, atol=0.525 / 2**10)


class Recorder:
    def __init__(self, plain: pgd.PGD) -> None:
        self.plain, self.radii = plain, torch.empty(0)

    def __call__(self, net: Any, batch: Batch, clean: Any, radius: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.radii = radius.clone()
        return self.plain(net, batch, clean, radius, *rest)


def test_the_memory_belongs_to_the_image_and_serves_its_next_look() -> None:
    """.005 at first; then what was found, not below .005 and not above 1.05 d_max; whatever the batch's order."""
    model, x, y, margins = half()
    net, d_max, index = EagerNet(model, CPU), torch.full((40,), D_MAX), torch.arange(100, 140)
    attack, shuffled = attack_of(200), attack_of(200)
    attack.pgd = recorder = Recorder(attack.pgd)  # type: ignore[assignment]
    attack(net, Batch(x, y, index), None, d_max, None, KEY)
    assert (recorder.radii == torch.tensor(0.005)).all()
    order = torch.randperm(40)
    for part in (order[:15], order[15:]):
        shuffled(net, Batch(x[part], y[part], index[part]), None, d_max[part], None, KEY)
    torch.testing.assert_close(attack.memory["radius"], shuffled.memory["radius"], rtol=0, atol=1e-6)
    remembered = attack.memory["radius"][index]
    attack(net, Batch(x[order], y[order], index[order]), None, d_max, None, KEY)
    torch.testing.assert_close(recorder.radii, remembered[order].clamp(0.005, 1.05 * D_MAX), rtol=1e-6, atol=0)
    assert (recorder.radii[margins[order] < 0] == torch.tensor(0.005)).all()
    attack(net, Batch(x, y, index), None, torch.full((40,), 0.01), None, KEY)
    assert recorder.radii.max() <= 0.0105 * (1 + 1e-6)


def test_pgd_takes_ten_steps_of_a_quarter_radius_from_a_uniform_start() -> None:
    config = anpgd.Config().build().pgd.config
    assert (config.steps, config.step_ratio, config.start, config.norm) == (10, Fraction(1, 4), "uniform", "linf")
    assert anpgd.Config(steps=4).build().pgd.config.step_ratio == Fraction(5, 8)


def test_an_image_that_is_not_finite_leaves_the_memory_finite() -> None:
    model, x, y, _ = half()
    x = x.clone()
    x[7] = torch.nan
    attack = attack_of()
    attack(EagerNet(model, CPU), Batch(x, y, torch.arange(40)), None, torch.full((40,), D_MAX), None, KEY)
    assert attack.memory["radius"].isfinite().all()
    assert attack.memory["radius"][7] == 0


class Table(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_outer_loss_by_hand() -> None:
    """p_y = .7 for all x; .4 for the first x' (S+), .1 for the next (S+, d >= d_max), .7 for the last (S-, x)."""
    x = torch.tensor([[0.7, 0.3]]).log().expand(3, 2)
    x_adv = torch.tensor([[0.4, 0.6], [0.1, 0.9], [0.7, 0.3]]).log()
    notes = {"counted": torch.tensor([True, False, True])}
    y = torch.zeros(3, dtype=torch.int64)
    # CE: .3566749, .9162907 and, of the one that adds nothing, 2.3025851
    mixed = (0.9162907 + 0.3566749) / 3
    loss = mma.Config().build().outer(Table(), x, x_adv, y, notes)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.3566749 / 3 + 2 / 3 * mixed, abs=1e-6)
    assert mma.Config(clean_weight=0.0).build().outer(Table(), x, x_adv, y, notes).item() == pytest.approx(
        mixed, abs=1e-6
    )


def test_the_gradient_is_that_of_the_equation_in_float64() -> None:
    z, a = 2 * torch.randn(9, 5), 2 * torch.randn(9, 5)
    y, counted = torch.randint(5, (9,)), torch.rand(9) < 0.6
    z64, a64 = z.double().requires_grad_(), a.double().requires_grad_()
    rows = torch.arange(9)
    natural = -z64.log_softmax(1)[rows, y].sum() / 9
    kept = sum(-a64.log_softmax(1)[i, y[i]] for i in range(9) if counted[i])
    expected = torch.autograd.grad(natural / 3 + 2 / 3 * kept / 9, (z64, a64))  # type: ignore[operator]
    z32, a32 = z.clone().requires_grad_(), a.clone().requires_grad_()
    loss = mma.Config().build().outer(Table(), z32, a32, y, {"counted": counted})
    for want, got in zip(expected, torch.autograd.grad(loss, (z32, a32)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_ommas_natural_images_are_not_run() -> None:
    seen: list[int] = []
    model = Table()
    model.register_forward_hook(lambda *_: seen.append(1))
    notes = {"counted": torch.ones(3, dtype=torch.bool)}
    arguments = (model, torch.randn(3, 5), torch.randn(3, 5), torch.zeros(3, dtype=torch.int64), notes)
    mma.Config(clean_weight=0.0).build().outer(*arguments)
    assert len(seen) == 1
    mma.Config().build().outer(*arguments)
    assert len(seen) == 3
    with pytest.raises(ValueError, match="counted"):
        mma.Config().build().outer(*arguments[:4])


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (mma, {"clean_weight": 1.0}),
        (mma, {"clean_weight": -0.1}),
        (anpgd, {"steps": 0}),
        (anpgd, {"search_steps": 0}),
        (anpgd, {"floor": Fraction(0)}),
        (anpgd, {"stride": Fraction(0)}),
    ],
)
def test_settings_without_sense_are_refused(module: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        module.Config(**options)
