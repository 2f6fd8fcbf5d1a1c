"""ST-AT: the squeeze pair against a plain re-derivation, and the loss with its stopped gradients."""

from __future__ import annotations

import itertools
from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from method_cases import method
from torch.nn.functional import cross_entropy

from mwpb_fast.attacks import squeeze
from mwpb_fast.config import OptimConfig, PrecisionConfig
from mwpb_fast.engine.net import EagerNet, crafting, module_mode
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.method import Batch
from mwpb_fast.models import build_model
from mwpb_fast.objectives import st
from mwpb_fast.optim import make_optimizer
from mwpb_fast.step import Step

CPU = make_precision(PrecisionConfig(device="cpu"))
KEY = torch.tensor([ops.derive_seed(1, 2)])
EPS = 8 / 255


class Table(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def log(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows).log()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_hand_value_whichever_image_is_upper_and_lower(order: tuple[int, ...]) -> None:
    """P = (.7, .3) and Q = (.5, .5) are the extremes, (.6, .4) lies between them: symKL(P, Q) = .0847298."""
    rows = [log((0.7, 0.3)), log((0.5, 0.5)), log((0.6, 0.4))]
    x, second, x_adv = (rows[i] for i in order)
    y = torch.tensor([0])
    losses = [
        st.Config(beta=beta).build().outer(Table(), x, x_adv, y, {"second": second}).item() for beta in (0.0, 6.0)
    ]
    assert losses[0] == pytest.approx(cross_entropy(x, y).item(), abs=1e-6)
    assert (losses[1] - losses[0]) / 6 == pytest.approx(0.0847298, abs=1e-6)


def test_each_sample_has_its_own_pair_and_the_loss_is_their_mean() -> None:
    x = log((0.7, 0.3), (0.6, 0.4), (0.3, 0.7))
    x_adv = log((0.5, 0.5), (0.6, 0.4), (0.5, 0.5))
    second = log((0.6, 0.4), (0.6, 0.4), (0.4, 0.6))
    y = torch.tensor([0, 0, 1])
    upper, lower = squeeze.select([x, second, x_adv], y)
    assert upper.tolist() == [2, 0, 2]
    assert lower.tolist() == [0, 0, 0]
    loss = st.Config(beta=6.0).build().outer(Table(), x, x_adv, y, {"second": second})
    expected = cross_entropy(x, y).item() + 6 * 2 * 0.0847298 / 3
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def frozen_loss(z: list[torch.Tensor], y: torch.Tensor, targets: list[torch.Tensor]) -> torch.Tensor:
    """The loss of float64 logits with the targets of both KLs given: [P_lower, P_upper]."""
    upper, lower = squeeze.select(z, y)
    high, low = squeeze.pick(z, upper), squeeze.pick(z, lower)
    first = (targets[0] * (targets[0].log() - high.log_softmax(1))).sum()
    other = (targets[1] * (targets[1].log() - low.log_softmax(1))).sum()
    return cross_entropy(z[0], y) + 6.0 * (first + other) / 2 / len(y)


def test_the_gradient_is_the_difference_quotient_at_frozen_targets() -> None:
    generator = torch.Generator().manual_seed(3)
    z = [1.5 * torch.randn(6, 4, generator=generator).double() for _ in range(3)]
    y = torch.randint(4, (6,), generator=generator)
    upper, lower = squeeze.select(z, y)
    assert {*upper.tolist(), *lower.tolist()} == {0, 1, 2}
    targets = [squeeze.pick(z, lower).softmax(1), squeeze.pick(z, upper).softmax(1)]
    leaves = [t.float().requires_grad_() for t in z]
    loss = st.Config(beta=6.0).build().outer(Table(), leaves[0], leaves[2], y, {"second": leaves[1]})
    assert loss.item() == pytest.approx(frozen_loss(z, y, targets).item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, leaves)
    h = 1e-6
    for number, sample, c in itertools.product(range(3), range(6), range(4)):
        values = []
        for sign in (1, -1):
            moved = [t.clone() for t in z]
            moved[number][sample, c] += sign * h
            values.append(frozen_loss(moved, y, targets).item())
        quotient = (values[0] - values[1]) / (2 * h)
        assert gradients[number][sample, c].item() == pytest.approx(quotient, abs=2e-6)


def test_the_inner_gradient_is_that_of_symkl_at_frozen_targets() -> None:
    """Up to the factor 2, which the sign step does not see."""
    one, other = torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 4).double()
    q = other.softmax(1)
    (expected,) = torch.autograd.grad((q * (q.log() - one.log_softmax(1))).sum() / 2, one)
    actual = st.Config().build().inner(one.detach().float(), other.float(), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(actual.double(), 2 * expected, rtol=1e-4, atol=1e-6)


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(n, 3, 8, 8, generator=generator)
    return x, torch.randint(10, (n,), generator=generator), torch.arange(100, 100 + n)


def make_model() -> torch.nn.Module:
    torch.manual_seed(5)
    return build_model("smallresnet-8", num_classes=10, channels=3)


def plain_pair(
    model: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    radius: torch.Tensor,
    starts: list[torch.Tensor],
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The published loop sample by sample, on one autograd graph of all three batches."""
    x_a, x_c = starts
    r = radius.view(-1, 1, 1, 1)
    for _ in range(k):
        points = [t.detach().requires_grad_() for t in (x, x_c, x_a)]
        logits = [model(p) for p in points]
        p = [z.softmax(1) for z in logits]
        highs, lows, total = [], [], torch.zeros(())
        for i in range(len(x)):
            own = [float(q[i, y[i]].detach()) for q in p]
            up, low = own.index(min(own)), own.index(max(own))
            highs.append(up)
            lows.append(low)
            a, b = p[up][i], p[low][i]
            total = total + (b.detach() * (b.detach().log() - a.log())).sum() / 2
            total = total + (a.detach() * (a.detach().log() - b.log())).sum() / 2
        found = torch.autograd.grad(total, points, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for g in found]

        def moved(choice: list[int], points: Any = points, gradients: Any = gradients) -> torch.Tensor:
            start = torch.stack([points[n][i].detach() for i, n in enumerate(choice)])
            g = torch.stack([gradients[n][i] for i, n in enumerate(choice)])
            return torch.minimum(torch.maximum(start + r / 4 * g.sign(), x - r), x + r).clamp(0, 1)

        x_a, x_c = moved(highs), moved(lows)
    return x_a, x_c


@pytest.mark.parametrize("mode", ["batch", "eval"])
def test_the_pair_is_that_of_the_published_loop(mode: str) -> None:
    model, (x, y, index) = make_model().double(), batch()  # in float32 roundings decide between near points
    x, attack = x.double(), squeeze.Config(steps=3).build()
    radius = torch.linspace(0.01, 0.06, 8, dtype=torch.float64)  # MWPB-ST: each sample's own
    starts_of = squeeze.Config(steps=0).build()
    with crafting(model, mode):
        net, notes = EagerNet(model, CPU), {}
        starts = [starts_of(net, Batch(x, y, index), None, radius, st.ST.inner, KEY, notes), notes["second"]]
        x_a = attack(net, Batch(x, y, index), None, radius, st.ST.inner, KEY, notes)
        a, c = plain_pair(model, x, y, radius, starts, 3)
    # a gradient that rounds to the other side of zero moves one pixel by a step
    for ours, theirs in ((x_a, a), (notes["second"], c)):
        assert ((ours - theirs).abs() > 1e-6).float().mean() < 0.005
        assert ((ours - x).abs().flatten(1).amax(1) <= radius + 1e-6).all()
        assert ours.min() >= 0
        assert ours.max() <= 1
    before = [b for b in model.buffers() if b.dtype == torch.int64]
    assert all(b == 0 for b in before)


def test_the_pair_is_squeezed_apart() -> None:
    """After the attack the upper point's label probability lies below, the lower's above the natural image's."""
    model, (x, y, index) = make_model(), batch(32)
    notes: dict[str, torch.Tensor] = {}
    with module_mode(model, training=False):
        net = EagerNet(model, CPU)
        x_a = squeeze.Config().build()(
            net, Batch(x, y, index), None, torch.full((32,), 4 * EPS), st.ST.inner, KEY, notes
        )
        p, high, low = (net.logits(t).softmax(1).gather(1, y[:, None]) for t in (x, x_a, notes["second"]))
    assert (high < p).float().mean() > 0.9
    assert (low > p).float().mean() > 0.9


def test_the_starts_are_two_and_belong_to_the_image() -> None:
    x, y, index = torch.full((8, 3, 8, 8), 0.5), torch.zeros(8, dtype=torch.int64), torch.arange(8)
    attack, net = squeeze.Config(steps=0).build(), EagerNet(make_model(), CPU)

    def starts(order: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        notes: dict[str, torch.Tensor] = {}
        x_a = attack(net, Batch(x, y, index[order]), None, torch.full((8,), EPS), st.ST.inner, key, notes)
        return x_a - 0.5, notes["second"] - 0.5

    plain = torch.arange(8)
    a, c = starts(plain, KEY)
    assert a.std().item() == pytest.approx(0.001, rel=0.1)
    assert c.std().item() == pytest.approx(0.001, rel=0.1)
    assert abs((a * c).mean() / (a.std() * c.std())) < 0.1
    order = torch.randperm(8)
    for ours, shuffled in zip((a, c), starts(order, KEY), strict=True):
        assert torch.equal(ours[order], shuffled)
    assert not torch.equal(starts(plain, KEY + 1)[1], c)


def test_the_folded_twin_gives_the_same_pair() -> None:
    """The passes are nested, so one graph of the twin is alive while the next is made."""
    model, (x, y, index) = make_model(), batch()
    attack, radius = squeeze.Config(steps=2).build(), torch.full((8,), EPS)
    results = []
    with module_mode(model, training=False):
        for net in (EagerNet(model, CPU), TwinNet(model, CPU, x)):
            notes: dict[str, torch.Tensor] = {}
            results.append(
                (attack(net, Batch(x, y, index), None, radius, st.ST.inner, KEY, notes), notes["second"])
            )
    for eager, twin in zip(*results, strict=True):
        assert ((eager - twin).abs() > 1e-6).float().mean() < 0.005


def test_a_step_tracks_the_natural_and_the_adversarial_batch_only() -> None:
    model, (x, y, index) = make_model(), batch()
    modes: list[tuple[bool, bool]] = []
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda m, i, o: modes.append((m.training, m.track_running_stats)))
    step = Step(
        model=model,
        net=EagerNet(model, CPU),
        optimizer=make_optimizer(model, OptimConfig(lr=0.1)),
        precision=CPU,
        attack_mode="batch",
    )
    asked = method(st.Config().build(), attack=squeeze.Config(steps=2).build())
    result = step(Batch(x, y, index), KEY, asked)
    assert result.finite
    assert modes == [(True, False)] * 8 + [(True, True)] * 2  # margin, two steps of three, x_c; x, x_a
    assert {b.item() for b in model.buffers() if b.dtype == torch.int64} == {2}


def test_the_loss_without_its_second_point_says_so() -> None:
    with pytest.raises(ValueError, match="second"):
        st.Config().build().outer(Table(), torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("module", "options"), [(st, {"beta": -1.0}), (squeeze, {"steps": -1}), (squeeze, {"sigma": 0.0})]
)
def test_settings_without_sense_are_refused(module: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        module.Config(**options)
