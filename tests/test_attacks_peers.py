"""This project's PGD against torchattacks' and foolbox's: same model, start, step and radius, same images.

The arithmetic differs in the last bit only: the peers project by x + clip(x' - x), which is not bit-equal to
min(max(x', x - eps), x + eps). A sign step forgets such a difference, unless it falls on a gradient element so
close to 0 that the sign turns: all pixels but one in ten thousand must agree to 1e-6. An l2 step keeps it, and
a ReLU whose input changes sign with the last bit makes the gradient jump, from where the iterates part: so each
l2 step is compared from the same iterate, to float rounding, and the whole run on a small model, image by image.

Where a model is certain, p_y - 1 in float32 is the remainder of a rounding, and two right programs get directions
that have nothing in common: the trained model's logits are divided by 10, so that it is certain of nothing.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Batch
from mwpb_fast.models import build_model, load_weights, read_checkpoint

EPS, STEP, STEPS = Fraction(8, 255), Fraction(2, 255), 10
L2_EPS, L2_STEP = Fraction(1, 2), Fraction(1, 10)
FP32 = Precision(torch.device("cpu"), torch.float32, torch.contiguous_format, False)


class Softened(nn.Module):
    """The model with its logits divided by 10."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) / 10


class Double(nn.Module):
    """float32 images through a float64 model: its gradients carry no rounding of their own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double()).float()


@pytest.fixture(scope="module")
def images(shared_data: Path) -> tuple[Tensor, Tensor]:
    """The first CIFAR-10 test image of every third class."""
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    found = []
    with tarfile.open(shared_data / "cifar10-jpeg.tar.xz", "r|xz") as tar:
        for member in tar:
            if member.name.endswith("/0000.jpg") and "test/" in member.name:
                content = tar.extractfile(member)
                assert content is not None
                found.append(numpy.array(image.open(io.BytesIO(content.read()))))
            if len(found) == 10:
                break
    x = torch.from_numpy(numpy.stack(found)).permute(0, 3, 1, 2).float().div(255)
    return x[::3].contiguous(), torch.arange(0, 10, 3)


def trained_resnet() -> nn.Module:
    package = pytest.importorskip("pyautoattack")
    model = build_model("resnet-18", num_classes=10)
    load_weights(model, read_checkpoint(Path(package.__file__).parent / "examples" / "model_test.pt"))
    return Softened(model).eval()


def small_double() -> nn.Module:
    torch.manual_seed(0)
    return Double(build_model("smallresnet-8", num_classes=10)).eval()


def ours(
    model: nn.Module, x: Tensor, y: Tensor, norm: Any, start: Any, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Start and adversarial images of this project's PGD."""
    eps, step = (EPS, STEP) if norm == "linf" else (L2_EPS, L2_STEP)
    attack = pgd.Config(norm=norm, steps=steps, step_size=step, start=start).build()
    radius, key, index = torch.full(y.shape, float(eps)), torch.tensor([5]), torch.arange(len(y))
    x_adv = attack(EagerNet(model, FP32), Batch(x, y, index), None, radius, cross_entropy, key)
    return attack.start(x, radius, key, index), x_adv


def torchattacks_pgd(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, start: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    peer = pytest.importorskip("torchattacks")
    if norm == "linf":
        attack = peer.PGD(model, float(EPS), float(STEP), STEPS, random_start=True)
        monkeypatch.setattr(Tensor, "uniform_", lambda self, low, high: self.copy_(start - x))
        return attack(x, y)
    attack = peer.PGDL2(model, float(L2_EPS), float(L2_STEP), STEPS, random_start=True)
    change = start - x
    # it draws delta = r * n / |n| * eps from n normal and r uniform
    monkeypatch.setattr(Tensor, "normal_", lambda self: self.copy_(change + (change == 0).all() * 1e-9))
    norms = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    monkeypatch.setattr(Tensor, "uniform_", lambda self, low, high: self.copy_(norms / float(L2_EPS)))
    return attack(x, y)


def foolbox_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    start: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    steps: int = STEPS,
) -> Tensor:
    peer, eagerpy = pytest.importorskip("foolbox"), pytest.importorskip("eagerpy")
    linf = norm == "linf"
    kind = peer.attacks.LinfPGD if linf else peer.attacks.L2PGD
    attack = kind(abs_stepsize=float(STEP if linf else L2_STEP), steps=steps, random_start=True)
    monkeypatch.setattr(attack, "get_random_start", lambda x0, epsilon: eagerpy.astensor(start.clone()))
    wrapped = peer.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return attack.run(wrapped, x, y, epsilon=float(EPS if linf else L2_EPS))


@pytest.mark.parametrize("make", [trained_resnet, small_double])
@pytest.mark.parametrize("start", ["none", "uniform"])
def test_linf_pgd_gives_the_images_of_the_peers(
    make: Callable[[], nn.Module], start: str, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), model = images, make()
    first, mine = ours(model, x, y, "linf", start)
    assert (mine - x).abs().max() > 7.9 / 255
    for peer in (torchattacks_pgd, foolbox_pgd):
        theirs = peer(model, x, y, "linf", first, monkeypatch)
        apart = ((mine - theirs).abs() > 1e-6).double().mean().item()
        assert apart <= 1e-4, f"{peer.__name__}: {apart:.2%} of the pixels differ"


@pytest.mark.parametrize("make", [trained_resnet, small_double])
def test_each_l2_step_is_the_peers(
    make: Callable[[], nn.Module], images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), model = images, make()
    first, mine = ours(model, x, y, "l2", "uniform", steps=8)
    net, iterate = EagerNet(model, FP32), first.clone()
    radius, step = torch.full(y.shape, float(L2_EPS)), torch.full(y.shape, float(L2_STEP))
    for _ in range(8):
        theirs = foolbox_pgd(model, x, y, "l2", iterate, monkeypatch, steps=1)
        gradient = net.input_grad(iterate, lambda logits: cross_entropy(logits, None, y))
        ops.l2_step_(iterate, gradient, x, radius, step)
        torch.testing.assert_close(iterate, theirs, rtol=0, atol=2e-7)
    assert torch.equal(iterate, mine)
    assert (mine - x).flatten(1).norm(dim=1).max() > 0.49  # the projection was at work


@pytest.mark.parametrize("start", ["none", "uniform"])
def test_l2_pgd_gives_the_images_of_the_peers(
    start: str, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), model = images, small_double()
    first, mine = ours(model, x, y, "l2", start)
    for peer in (torchattacks_pgd, foolbox_pgd):
        theirs = peer(model, x, y, "l2", first, monkeypatch)
        apart = (mine - theirs).flatten(1).abs().amax(1) > 2e-6
        assert apart.sum() <= 1, f"{peer.__name__}: {apart.tolist()}"
