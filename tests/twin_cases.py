"""Models and helpers of the twin's tests."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision
from mwpb_fast.engine.processor import cpu_has_bf16
from mwpb_fast.models import build_model

CPU32 = Precision(torch.device("cpu"), torch.float32, torch.channels_last, oracle=False)
ORACLE = Precision(torch.device("cpu"), torch.float32, torch.contiguous_format, oracle=True)
ROOT = Path(__file__).resolve().parents[1]
NORMALIZE = ((0.49, 0.48, 0.44), (0.25, 0.24, 0.26))
needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="needs a CPU with bfloat16")


class VGG(nn.Module):
    """Biases, in-place ReLUs, pooling, dropout, `view`, a batch norm after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (8, "M", 16, 16, "M", 24, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(channels, width, 3, padding="same"),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.hidden, self.norm = nn.Linear(24 * 4, 20), nn.BatchNorm1d(20, affine=False)
        self.drop, self.classifier = nn.Dropout(), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.relu(self.norm(self.hidden(x.view(x.size(0), -1))))
        return self.classifier(self.drop(x))


class Assorted(nn.Module):
    """Batch norm on the input, a scaled parameter, every spelling of addition and ReLU, groups, a convolution
    that is used twice, an addition that must not be fused because its operand is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.BatchNorm2d(3)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.c = nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.gate = nn.Conv2d(8, 1, 1)
        self.head = nn.Linear(8, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.entry(x))
        self.act(x)  # only its effect on x is used
        y = self.b(x)
        y += x
        y = y.relu_() * self.gain
        z = torch.add(self.c(y), x).relu()
        z = self.bn(z.add(self.c(z)))
        w = self.c(z)
        w = torch.relu(w + z) + w
        w = self.gate(w) + w
        v = w + 1  # no operation in place, whatever the 1 looks like
        w = F.relu(input=w) + v
        return self.head(F.adaptive_avg_pool2d(w, 1).flatten(1))


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training; eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def example_resnet() -> nn.Module:
    pytest.importorskip("pyautoattack")
    package = importlib.import_module("pyautoattack.examples.resnet")
    model = package.ResNet18()
    model.load_state_dict(torch.load(Path(package.__file__).with_name("model_test.pt"), map_location="cpu"))
    return model


def ours(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: build_model(name, num_classes=10, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet-18": (ours("resnet-18", normalize=NORMALIZE), (3, 3, 16, 16)),
    "resnet-50": (ours("resnet-50"), (3, 3, 8, 8)),
    "preactresnet-18": (ours("preactresnet-18", normalize=NORMALIZE), (3, 3, 8, 12)),
    "wrn-16-2": (ours("wrn-16-2"), (3, 3, 16, 16)),
    "smallresnet-5": (ours("smallresnet-5", channels=1), (5, 1, 9, 7)),
    "example": (example_resnet, (3, 3, 32, 32)),
    "vgg": (VGG, (5, 3, 16, 16)),
    "assorted": (Assorted, (3, 3, 11, 13)),
}


def small(norm: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)]
    return nn.Sequential(*layers[: 1 if not norm else 2], *layers[2:])


def descend(y: Tensor) -> Callable[[Tensor], Tensor]:
    """Gradient of the summed cross-entropy."""
    return lambda logits: (logits.float().softmax(1) - F.one_hot(y, logits.shape[1])).to(logits.dtype)


def same(net: Any, model: nn.Module, x: Tensor) -> None:
    """Logits within 1e-4 of the model's, gradients too but for ReLUs whose argument rounds across zero: those
    are rare, so most images have none, and each moves the gradient of its image by a little."""
    y = torch.arange(len(x)) % 4
    eager, plain = EagerNet(model, CPU32), x.contiguous()  # a `view` in a model wants images so
    logits, expected = net.logits(x), eager.logits(plain)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    gradient, expected = net.input_grad(x, descend(y)), eager.input_grad(plain, descend(y))
    assert gradient.dtype == torch.float32
    error = (gradient - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-30)
    assert error.median() <= 1e-4
    assert error.max() <= 2e-2


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.name(), args))
        return func(*args, **(kwargs or {}))


# parity -------------------------------------------------------------------------------------------------------
