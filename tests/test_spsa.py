"""SPSA: the estimator where it is known, its directions, the ball, and independence of the other images."""

from __future__ import annotations

import mwpb_kernels as ops
import pytest
import torch
from torch import Tensor, nn

from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.spsa import SPSA, margin
from mwpb_fast.models import build_model


def test_margin_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.5, 1.0, 3.0]])
    assert margin(logits, 0).tolist() == [1.0, -2.5]
    assert margin(logits, 2).tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_each_draw_on_a_linear_loss_is_a_v_v(delta: float) -> None:
    a, x = torch.randn(3, 4, 4, dtype=torch.float64), torch.rand(3, 4, 4, dtype=torch.float64)
    spsa = SPSA(pairs=1, delta=delta)
    v = spsa.directions(x, 5, 1, 0)
    assert v.shape == (1, 3, 4, 4)
    got = spsa.gradient(lambda points: (points * a).flatten(1).sum(1) + 3, x, v)
    torch.testing.assert_close(got, (a * v[0]).sum() * v[0], rtol=0, atol=1e-11)


def test_mean_of_the_draws_is_the_gradient() -> None:
    pairs = 40_000
    a, x = torch.randn(2, 2, 3, dtype=torch.float64), torch.rand(2, 2, 3, dtype=torch.float64)
    spsa = SPSA(pairs=pairs)
    v = spsa.directions(x, 0, 1, 0)
    got = spsa.gradient(lambda points: (points * a).flatten(1).sum(1), x, v, batch_size=4096)
    # a draw's element k is a_k plus the other elements with random signs: five standard errors
    assert (got - a).abs().max() < 5 * a.norm() / pairs**0.5
    # the pieces in which the pairs go through the model do not matter
    once = spsa.gradient(lambda points: (points * a).flatten(1).sum(1), x, v, batch_size=2 * pairs)
    torch.testing.assert_close(got, once, rtol=0, atol=1e-12)


def test_directions_are_fair_signs_of_seed_image_and_iteration() -> None:
    spsa, x = SPSA(pairs=64), torch.zeros(3, 8, 8)
    v = spsa.directions(x, 7, 2, 1)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    flat = v.flatten()
    assert abs(flat.mean()) < 5 / len(flat) ** 0.5
    rows = v.flatten(1) @ v.flatten(1).T - 192 * torch.eye(64)
    assert rows.abs().max() < 6 * 192**0.5  # pairs are not repeated or opposite
    assert torch.equal(v, spsa.directions(x, 7, 2, 1))
    for other in ((8, 2, 1), (7, 3, 1), (7, 2, 2)):
        same = (v == spsa.directions(x, *other)).double().mean()
        assert abs(same - 0.5) < 5 * 0.5 / len(flat) ** 0.5, other
    words = ops.philox_words(torch.tensor([7]), torch.tensor([ops.derive_seed(1, 2)]), 100, 1).flatten()
    assert flat[:40].tolist() == [1.0 if int(words[k // 32]) >> (k % 32) & 1 else -1.0 for k in range(40)]


def attacked(model: nn.Module, x: Tensor, y: Tensor, index: Tensor, eps: float = 0.05) -> tuple[Tensor, Tensor]:
    spsa = SPSA(pairs=8, iterations=5)
    return spsa.attack(model, x, y, index, eps=eps, seed=3, batch_size=10)


def test_an_image_does_not_depend_on_the_others() -> None:
    model = build_model("smallresnet-8", num_classes=10).eval()
    x, index = torch.rand(6, 3, 8, 8), torch.arange(100, 106)
    with torch.no_grad():
        y = model(x).argmax(1)
    x_adv, found = attacked(model, x, y, index)
    order = torch.tensor([4, 1, 5])
    part_adv, part = attacked(model, x[order], y[order], index[order])
    assert torch.equal(part_adv, x_adv[order])
    assert torch.equal(part, found[order])
    moved, _ = attacked(model, x, y, index + 1)
    assert not torch.equal(moved, x_adv)


def test_ball_range_and_what_is_right() -> None:
    model = build_model("smallresnet-8", num_classes=10).eval()
    x = torch.cat((torch.rand(4, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    for eps in (0.0, 1e-3, 0.05):
        x_adv, found = attacked(model, x, y, torch.arange(6), eps)
        assert (x_adv - x).abs().max() <= eps + 1e-7
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        with torch.no_grad():
            assert torch.equal(found, torch.stack([model(one[None])[0].argmax() for one in x_adv]))
        assert torch.equal(x_adv[0], x[0])  # wrong from the start


def test_descent_starts_at_the_image_with_steps_of_the_learning_rate() -> None:
    # Adam's first step is the learning rate along the sign, whatever the slope
    a = torch.tensor([[[0.3, -2.0, 1e-2]]])
    model = lambda points: torch.stack(((points * a).flatten(1).sum(1) + 9, torch.zeros(len(points))), 1)  # noqa: E731
    spsa, x = SPSA(pairs=4000, iterations=1, learning_rate=0.01), torch.full((1, 1, 1, 3), 0.5)
    x_adv, found = spsa.attack(model, x, torch.tensor([0]), torch.tensor([0]), eps=0.5, seed=0, batch_size=8000)
    assert found.tolist() == [0]
    torch.testing.assert_close(x_adv[0, :, :, :2], torch.tensor([[[0.49, 0.51]]]), rtol=0, atol=1e-5)
    two = SPSA(pairs=4000, iterations=30, learning_rate=0.01)
    x_adv, _ = two.attack(model, x, torch.tensor([0]), torch.tensor([0]), eps=0.1, seed=0, batch_size=8000)
    torch.testing.assert_close(x_adv[0, :, :, :2], torch.tensor([[[0.4, 0.6]]]), rtol=0, atol=1e-5)


def test_estimate_is_taken_at_the_iterate_not_at_the_image() -> None:
    # the margin 1 + 100 (p - 0.47)^2 has its minimum between the image, 0.5, and the end of the ball, 0.4
    def model(points: Tensor) -> Tensor:
        margins = 1 + 100 * (points.flatten(1)[:, 0] - 0.47) ** 2
        return torch.stack((margins, torch.zeros(len(points))), 1)

    spsa, x = SPSA(pairs=2, iterations=60), torch.full((1, 1, 1, 1), 0.5)
    x_adv, _ = spsa.attack(model, x, torch.tensor([0]), torch.tensor([0]), eps=0.1, seed=0)
    assert abs(x_adv.item() - 0.47) < 0.02


def test_defaults_are_the_papers_and_forwards_are_counted() -> None:
    spsa = SPSA()
    assert (spsa.pairs, spsa.iterations, spsa.delta, spsa.learning_rate) == (256, 100, 0.001, 0.01)
    assert find_attack("spsa").parameters == find_attack("spsa256").parameters
    assert find_attack("spsa128").parameters["pairs"] == 128
    sent = 0

    def never(points: Tensor) -> Tensor:
        nonlocal sent
        sent += len(points)
        return torch.tensor([[1.0, 0.0]]).expand(len(points), 2)

    few = SPSA(pairs=6, iterations=4)
    few.attack(never, torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), torch.arange(2), eps=0.1, seed=0)
    assert sent == 2 * few.forwards == 2 * (4 * (12 + 1) + 1)
