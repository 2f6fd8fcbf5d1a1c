"""The training pass with its batch norms, additions and ReLUs fused, beside the model itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_cases import AT, batch, make_step
from test_train import final_state, tiny
from torch import Tensor, nn
from twin_cases import VGG, ours

from mwpb_fast import train
from mwpb_fast.engine.fold import UnfoldableError
from mwpb_fast.engine.fused_pass import FusedNorm, FusedPass
from mwpb_fast.engine.net import untracked
from mwpb_fast.engine.twin import EngineWarning

X, Y = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 7


def fused_layers(net: FusedPass) -> list[FusedNorm]:
    return net._layers


def both(model: nn.Module) -> tuple[nn.Module, nn.Module, FusedPass]:
    """A copy in train mode, the model, and its fused pass."""
    plain = copy.deepcopy(model.train())
    return plain, model, FusedPass(model, X)


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    """Gradients, but for those that are mere rounding, as of a bias before a norm; and all that is saved."""
    largest = max(p.grad.abs().max() for p in other.parameters() if p.grad is not None)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=float(1e-5 * largest))
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("make", "norms"),
    [(ours("smallresnet-4"), 7), (ours("preactresnet-18"), 17), (ours("wrn-10-1"), 7), (VGG, 4)],
)
def test_it_is_the_model(make: Any, norms: int) -> None:
    """Two passes: logits, gradients, running statistics and their count; and what is saved has the same names.

    In float64: in float32 a value within rounding of a ReLU's kink takes the other side on one processor in many.
    """
    plain, model, net = both(make())
    plain.double(), model.double()
    x = X.double()
    assert len(fused_layers(net)) == norms
    for seed in (0, 1):
        logits = []
        for one in (plain, net):
            torch.manual_seed(seed)  # of dropout
            logits.append(one(x))
            F.cross_entropy(logits[-1], Y).backward()
        torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
    assert_alike(model, plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.eval()
    assert torch.equal(net(x), model(x))


def test_making_it_leaves_no_trace() -> None:
    model = VGG().eval()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    FusedPass(model, X)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_statistics_that_are_to_be_left_alone_are() -> None:
    plain, model, net = both(ours("smallresnet-4")())
    before = copy.deepcopy(model.state_dict())
    with untracked(net):
        net(X)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    frozen: Any = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    other: Any = next(m for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    for norm in (frozen, other):  # a norm alone, as users freeze some
        norm.eval()
    torch.testing.assert_close(net(X), plain(X), rtol=1e-4, atol=1e-5)
    assert torch.equal(frozen.running_mean, before["bn1.running_mean"])


class Twice(nn.Module):
    """A norm that is used twice, one without weights, one without momentum, one that two read, and one to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.shared, self.bare = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.average, self.read, self.last = nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(self.conv(x)))
        x = F.relu(self.bare(F.relu(self.shared(x))))
        y = self.read(F.relu(self.average(x)))
        x = torch.relu(self.last(F.relu(y)) + y)
        return self.out(x.mean((2, 3)))


def test_what_is_no_plain_norm_is_left_as_it_is() -> None:
    plain, model, net = both(Twice())
    assert [layer.of[0] for layer in fused_layers(net)] == [model.last]
    plain.double(), model.double()
    for one in (plain, net):
        F.cross_entropy(one(X.double()), Y).backward()
    assert_alike(model, plain)


class Moody(nn.Module):
    """Does something else at the second call, which no trace shows."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(X[0].numel()), nn.Linear(X[0].numel(), 7)

    def forward(self, x: Tensor) -> Tensor:
        Moody.calls += 1
        x = F.relu(self.norm(x.flatten(1)))
        return self.out(x) if Moody.calls == 1 else self.out(-x)


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(UnfoldableError, match="no batch norm with a ReLU behind it"):
        FusedPass(nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 7)), X)
    with pytest.raises(UnfoldableError, match="fused, it gives another logits"):
        FusedPass(Moody(), X)
    hooked = ours("smallresnet-4")()
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(UnfoldableError, match="has hooks"):
        FusedPass(hooked, X)


def test_a_model_that_changes_takes_its_plain_pass() -> None:
    plain, model, net = both(ours("smallresnet-4")())
    for one in (plain, model):
        one.bn1.momentum = 0.7  # type: ignore[union-attr]
    with pytest.warns(EngineWarning, match="changed since its training pass was fused"):
        logits = net(X)
    assert torch.equal(logits, plain(X))
    assert torch.equal(model.bn1.running_mean, plain.bn1.running_mean)  # type: ignore[union-attr, arg-type]


def test_a_step_on_it_is_the_plain_step() -> None:
    step, other = make_step(), make_step()
    other.model.load_state_dict(step.model.state_dict())
    other.trained = FusedPass(other.model, batch(0)[0].x)
    assert any(isinstance(m, nn.BatchNorm2d) for m in other.trained.modules())  # as objectives look for them
    for number in range(2):
        one, two = (s(*batch(number), AT) for s in (step, other))
        torch.testing.assert_close(two.loss, one.loss, rtol=1e-4, atol=1e-5)
    for name, value in step.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_a_run_on_it_is_that_of_the_model(tmp_path: Any) -> None:
    """With weights that are perturbed, where statistics must not move; as near as steps along signs leave it."""
    losses, names = [], []
    for training in ("plain", "fused"):
        options = ("--perturbation=awp", "--epochs=1", f"--precision.training={training}")
        losses.append(train.run(tiny(*options), tmp_path / training, quiet=True)["loss"])
        names.append(list(final_state(tmp_path / training)["model"]))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert names[0] == names[1]
