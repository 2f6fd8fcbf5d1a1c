"""PGD where the optimum is known; inner losses by hand and against autograd; what an attack leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mwpb_fast import inner_losses
from mwpb_fast.attacks import pgd
from mwpb_fast.engine.net import EagerNet, module_mode
from mwpb_fast.engine.precision import Precision
from mwpb_fast.method import Batch
from mwpb_fast.models import build_model

SHAPE = (3, 5, 7)


def precision(dtype: torch.dtype = torch.float32) -> Precision:
    return Precision(torch.device("cpu"), dtype, torch.contiguous_format, False)


def linear(classes: int = 2) -> nn.Module:
    """Logits W x + b: the direction in which any margin falls is the same everywhere."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 7, classes)).eval()


def key(value: int = 7) -> Tensor:
    return torch.tensor([value])


def attack(model: nn.Module, x: Tensor, y: Tensor, radius: Tensor, **options: Any) -> Tensor:
    loss = options.pop("inner", inner_losses.cross_entropy)
    net = EagerNet(model, options.pop("precision", precision()))
    seed, index = options.pop("key", key()), options.pop("index", torch.arange(len(x)))
    clean = net.logits(x)
    return pgd.Config(**options).build()(net, Batch(x, y, index), clean, radius, loss, seed)


def downhill(model: nn.Module, y: Tensor) -> Tensor:
    """Direction (B, *SHAPE) that raises the other class's logit over the label's, two classes."""
    weight = model[1].weight.detach()
    return (weight[1 - y] - weight[y]).reshape(-1, *SHAPE)


@pytest.mark.parametrize("start", ["none", "gaussian", "uniform"])
@pytest.mark.parametrize("loss", [inner_losses.cross_entropy, inner_losses.carlini_wagner])
def test_linf_reaches_the_corner_of_each_samples_ball(start: str, loss: inner_losses.Inner) -> None:
    model, x, y = linear(), torch.rand(9, *SHAPE), torch.arange(9) % 2
    radius = torch.linspace(0.0, 0.3, 9)
    x_adv = attack(model, x, y, radius, start=start, steps=10, inner=loss)
    corner = (x + radius.view(-1, 1, 1, 1) * downhill(model, y).sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, corner, rtol=0, atol=2e-7)


def test_l2_reaches_the_ball_along_the_gradient() -> None:
    model, y = linear(), torch.arange(6) % 2
    x, radius = torch.full((6, *SHAPE), 0.5), torch.linspace(0.0, 0.4, 6)
    x_adv = attack(model, x, y, radius, norm="l2", start="none", steps=5)
    direction = downhill(model, y)
    direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_adv, x + radius.view(-1, 1, 1, 1) * direction, rtol=0, atol=1e-6)


def test_step_size_fixed_or_a_share_of_the_radius() -> None:
    model, x, y = linear(), torch.full((3, *SHAPE), 0.5), torch.zeros(3, dtype=torch.long)
    radius = torch.tensor([0.1, 0.2, 0.4])
    shared = attack(model, x, y, radius, start="none", steps=1)
    fixed = attack(model, x, y, radius, start="none", steps=3, step_size=Fraction(1, 255))
    for i in range(3):
        assert (shared[i] - x[i]).abs().amax().item() == pytest.approx(radius[i].item() / 4, abs=1e-7)
        assert (fixed[i] - x[i]).abs().amax().item() == pytest.approx(3 / 255, abs=3e-7)


def test_no_steps_return_the_start_and_leave_x_alone() -> None:
    model, x, y = linear(), torch.rand(4, *SHAPE), torch.zeros(4, dtype=torch.long)
    before, radius = x.clone(), torch.full((4,), 0.1)
    same = attack(model, x, y, radius, start="none", steps=0)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()
    near = attack(model, x, y, radius, start="gaussian", steps=0)
    assert 0 < (near - x).abs().max() < 0.01  # 0.001 * N(0, 1), 420 draws
    wide = attack(model, x, y, radius, start="uniform", steps=0)
    assert 0.05 < (wide - x).abs().max() <= 0.1 + 1e-7
    assert torch.equal(x, before)


def test_steps_and_sigma_are_checked() -> None:
    for options in ({"steps": -1}, {"sigma": -0.1}):
        with pytest.raises(ValueError, match="negative"):
            pgd.Config(**options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sample_stays_in_its_ball_and_in_the_pixel_range(norm: str, dtype: torch.dtype) -> None:
    model = build_model("smallresnet-8", num_classes=10).eval()
    x, y = torch.rand(8, 3, 9, 9).round(decimals=1), torch.arange(8)
    radius = torch.tensor([0.0, 1e-4, 0.01, 8 / 255, 0.1, 0.5, 1.0, 3.0])
    x_adv = attack(model, x, y, radius, norm=norm, start="uniform", steps=4, precision=precision(dtype))
    change = (x_adv.double() - x.double()).flatten(1)
    distance = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert (distance <= radius.double() * (1 + 1e-6) + 1e-7).all()
    assert x_adv.dtype == torch.float32
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_attack_raises_the_loss_of_a_network() -> None:
    model = build_model("smallresnet-8", num_classes=10).eval()
    x, y = torch.rand(16, 3, 9, 9), torch.arange(16) % 10
    x_adv = attack(model, x, y, torch.full((16,), 8 / 255))
    loss = nn.CrossEntropyLoss(reduction="none")
    with torch.no_grad():
        assert (loss(model(x_adv), y) > loss(model(x), y)).all()


def test_key_and_index_alone_decide_the_noise() -> None:
    model = build_model("smallresnet-8", num_classes=10).eval()
    x, y, radius = torch.rand(6, 3, 9, 9), torch.arange(6), torch.full((6,), 8 / 255)
    first = attack(model, x, y, radius, start="uniform", steps=0)
    torch.manual_seed(1)
    assert torch.equal(first, attack(model, x, y, radius, start="uniform", steps=0))
    assert not torch.equal(first, attack(model, x, y, radius, start="uniform", steps=0, key=key(8)))
    order = torch.tensor([5, 0, 3])
    part = attack(model, x[order], y[order], radius[order], start="uniform", steps=0, index=order)
    assert torch.equal(first[order], part)


def test_layout_is_kept() -> None:
    model, y = build_model("smallresnet-8", num_classes=10).eval(), torch.arange(4)
    x = torch.rand(4, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    x_adv = attack(model, x, y, torch.full((4,), 0.03), steps=2)
    assert x_adv.is_contiguous(memory_format=torch.channels_last)


def test_no_weight_gradient_is_left_and_the_mode_is_restored() -> None:
    model = build_model("smallresnet-8", num_classes=10)
    model.layer1[0].bn1.eval()
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    x, y = torch.rand(4, 3, 9, 9), torch.arange(4)
    with module_mode(model, training=False):
        assert not any(module.training for module in model.modules())
        attack(model, x, y, torch.full((4,), 0.03), steps=2)
    with pytest.raises(KeyError), module_mode(model, training=True):
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(buffers, model.buffers(), strict=True))


# inner losses ---------------------------------------------------------------------------------------------------


def margin_loss(kappa: float) -> Callable[..., Tensor]:
    def loss(logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        own = logits.gather(1, y[:, None]).squeeze(1)
        other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        return -(own - other + kappa).clamp(min=0)

    return loss


def dlr_loss(logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
    own = logits.gather(1, y[:, None]).squeeze(1)
    other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    ranked = logits.sort(dim=1, descending=True).values
    return -(own - other) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def cross_entropy_loss(logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")


def kl_loss(logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
    assert clean is not None
    target = clean.softmax(1)
    return (target * (target.log() - logits.log_softmax(1))).sum(1)


LOSSES = [
    (inner_losses.cross_entropy, cross_entropy_loss),
    (inner_losses.kl_to_clean, kl_loss),
    (inner_losses.carlini_wagner, margin_loss(50.0)),
    (inner_losses.dlr, dlr_loss),
]


@pytest.mark.parametrize(("closed", "loss"), LOSSES, ids=["ce", "kl", "cw", "dlr"])
def test_closed_forms_are_the_gradients_of_the_losses(
    closed: inner_losses.Inner, loss: Callable[..., Tensor]
) -> None:
    logits, clean = 3 * torch.randn(64, 10), 3 * torch.randn(64, 10)
    y = torch.randint(10, (64,))
    expected = inner_losses.gradient_of(loss)(logits.double(), clean.double(), y).float()
    torch.testing.assert_close(closed(logits, clean, y), expected, rtol=1e-5, atol=1e-6)


def test_values_worked_by_hand() -> None:
    logits, y = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    assert margin_loss(50.0)(logits, None, y).item() == -51
    assert inner_losses.carlini_wagner(logits, None, y).tolist() == [[-1, 1, 0]]
    fooled = torch.tensor([[0.0, 60.0, 1.0]])
    assert inner_losses.carlini_wagner(fooled, None, y).tolist() == [[0, 0, 0]]
    four = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert dlr_loss(four, None, y).item() == pytest.approx(-0.5)
    # u / v with u = -(z0 - z1) = -1 and v = z0 - z2 = 2: (-1/v - u/v^2, 1/v, u/v^2, 0)
    assert inner_losses.dlr(four, None, y).flatten().tolist() == pytest.approx([-0.25, 0.5, -0.25, 0], abs=1e-6)
    p = torch.tensor([[0.7, 0.2, 0.1]])
    torch.testing.assert_close(inner_losses.cross_entropy(p.log(), None, y), torch.tensor([[-0.3, 0.2, 0.1]]))
    q = torch.tensor([[0.5, 0.3, 0.2]])
    torch.testing.assert_close(inner_losses.kl_to_clean(q.log(), p.log(), y), q - p)


def test_kl_wants_the_clean_logits() -> None:
    with pytest.raises(ValueError, match="natural"):
        inner_losses.kl_to_clean(torch.zeros(1, 3), None, torch.zeros(1, dtype=torch.long))


def test_a_losss_own_gradient_needs_no_closed_form() -> None:
    model, x, y = linear(), torch.rand(5, *SHAPE), torch.arange(5) % 2
    radius = torch.full((5,), 0.1)
    by_autograd = attack(model, x, y, radius, inner=inner_losses.gradient_of(cross_entropy_loss))
    assert torch.equal(by_autograd, attack(model, x, y, radius))
