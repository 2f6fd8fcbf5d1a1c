"""Architectures by analytic counts and by the field's weights; state-dict names; refusals."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwpb_fast.models import available, build_model, load_weights, read_checkpoint

NAMES = ["resnet-18", "preactresnet-18", "wrn-10-2", "wrnsilu-10-2", "smallresnet-5"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def meta(name: str, **options: int) -> nn.Module:
    """The model without storage: counting needs shapes only."""
    with torch.device("meta"):
        return build_model(name, num_classes=options.pop("num_classes", 10), **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, channels: int, size: int) -> int:
    total = 0

    def count(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        nonlocal total
        total += out[0].numel() * (module.weight.numel() // module.weight.shape[0])

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.empty(2, channels, size, size, device="meta"))
    return total


def wrn_counts(depth: int, width: int) -> tuple[int, int]:
    """Parameters and multiply-adds of WRN-depth-width on 32x32 RGB, 10 classes, in closed form."""
    n = (depth - 4) // 6
    weights, ops, norms = 27 * 16, 27 * 16 * 1024, 0
    inputs = 16
    for i in range(3):
        outputs, positions = 16 * width * 2**i, 1024 // 4**i
        stage = 9 * inputs * outputs + (2 * n - 1) * 9 * outputs**2 + inputs * outputs
        weights, ops = weights + stage, ops + stage * positions
        norms += 2 * inputs + 2 * outputs * (2 * n - 1)
        inputs = outputs
    return weights + norms + 2 * inputs + 10 * inputs + 10, ops + 10 * inputs


def randomize_(model: nn.Module) -> nn.Module:
    """Give BN layers statistics and affine terms that differ from those of initialisation."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def example_package() -> ModuleType:
    pytest.importorskip("pyautoattack")
    return importlib.import_module("pyautoattack.examples.resnet")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet-18", 11_173_962),
        ("resnet-34", 21_282_122),
        ("resnet-50", 23_520_842),
        ("preactresnet-18", 11_172_170),
        ("wrn-34-10", 46_160_474),
    ],
)
def test_parameter_counts(name: str, expected: int) -> None:
    assert parameters(meta(name)) == expected


@pytest.mark.parametrize(("depth", "width"), [(34, 10), (28, 4), (10, 1), (16, 3)])
def test_wrn_counts_in_closed_form(depth: int, width: int) -> None:
    model = meta(f"wrn-{depth}-{width}")
    weights, ops = wrn_counts(depth, width)
    # At width 1 the first stage keeps its 16 channels and needs no projection.
    spared = 16 * 16 if width == 1 else 0
    assert parameters(model) == weights - spared
    assert macs(model, 3, 32) == ops - spared * 1024


def test_smallresnet_count_in_closed_form() -> None:
    w, channels, classes = 6, 1, 7
    convs = 9 * channels * w + 18 * w * w + (2 + 4) * 9 * w * w + 2 * w * w + (8 + 16) * 9 * w * w + 8 * w * w
    norms = 2 * (w + 2 * w + 3 * 2 * w + 3 * 4 * w)
    assert parameters(meta("smallresnet-6", num_classes=7, channels=1)) == convs + norms + 4 * w * 7 + classes


def test_multiply_adds() -> None:
    assert macs(meta("resnet-18"), 3, 32) == 555_422_720
    assert wrn_counts(34, 10)[1] == pytest.approx(6.66e9, rel=2e-3)
    assert macs(meta("smallresnet-16", channels=1), 1, 8) < 2e6


def test_state_dict_names_of_preactresnet() -> None:
    blocks = {f"layer{i}.{j}": i > 1 and j == 0 for i in range(1, 5) for j in range(2)}
    expected = {"conv1.weight", "bn.weight", "bn.bias", "linear.weight", "linear.bias"}
    for block, projected in blocks.items():
        expected |= {f"{block}.{part}" for part in ("conv1.weight", "conv2.weight")}
        expected |= {f"{block}.bn{k}.{part}" for k in (1, 2) for part in ("weight", "bias")}
        expected |= {f"{block}.shortcut.0.weight"} if projected else set()
    assert {name for name, _ in meta("preactresnet-18").named_parameters()} == expected


def test_state_dict_names_of_wrn() -> None:
    expected = {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"}
    for block in [f"block{i}.layer.{j}" for i in range(1, 4) for j in range(5)]:
        expected |= {f"{block}.{part}" for part in ("conv1.weight", "conv2.weight")}
        expected |= {f"{block}.bn{k}.{part}" for k in (1, 2) for part in ("weight", "bias")}
        expected |= {f"{block}.convShortcut.weight"} if block.endswith(".0") else set()
    assert {name for name, _ in meta("wrn-34-10").named_parameters()} == expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_field_weights_give_the_field_logits(layout: torch.memory_format) -> None:
    package = example_package()
    weights = read_checkpoint(Path(package.__file__).with_name("model_test.pt"))
    reference = package.ResNet18()
    reference.load_state_dict(weights)
    model = build_model("resnet-18", num_classes=10)
    model.load_state_dict(weights, strict=True)
    assert list(model.state_dict()) == list(weights)
    reference.eval().to(memory_format=layout)
    model.eval().to(memory_format=layout)
    x = torch.rand(9, 3, 32, 32).to(memory_format=layout)
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        # Only the order in which the 16 positions are summed may differ; with the same pooling nothing does.
        model.pool = nn.AvgPool2d(4)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("ours", ["resnet-18", "resnet-34", "resnet-50"])
def test_training_step_equals_the_field_class(ours: str) -> None:
    package = example_package()
    reference = randomize_(getattr(package, f"ResNet{ours.removeprefix('resnet-')}")())
    model = build_model(ours, num_classes=10)
    load_weights(model, reference.state_dict())
    model.pool = nn.AvgPool2d(4)
    x = torch.rand(3, 3, 32, 32)
    expected, logits = reference(x), model(x)
    assert torch.equal(logits, expected)
    expected.square().sum().backward()
    logits.square().sum().backward()
    gradients = dict(reference.named_parameters())
    assert all(torch.equal(p.grad, gradients[name].grad) for name, p in model.named_parameters())
    buffers = dict(reference.named_buffers())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def preactivation_logits(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """PreActResNet-18 or a WRN evaluated from its state dict alone, by the equations and in eval mode."""
    wide = "fc.weight" in weights
    stages = [f"block{i}.layer" for i in (1, 2, 3)] if wide else [f"layer{i}" for i in (1, 2, 3, 4)]
    shortcut, norm, classifier = ("convShortcut", "bn1", "fc") if wide else ("shortcut.0", "bn", "linear")

    def normed(name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            weights[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    x = F.conv2d(x, weights["conv1.weight"], padding=1)
    for i, name in enumerate(stages):
        j = 0
        while f"{name}.{j}.conv1.weight" in weights:
            block, stride = f"{name}.{j}", 2 if i > 0 and j == 0 else 1
            out = normed(f"{block}.bn1", x)
            if f"{block}.{shortcut}.weight" in weights:
                x = F.conv2d(out, weights[f"{block}.{shortcut}.weight"], stride=stride)
            out = F.conv2d(out, weights[f"{block}.conv1.weight"], stride=stride, padding=1)
            x = x + F.conv2d(normed(f"{block}.bn2", out), weights[f"{block}.conv2.weight"], padding=1)
            j += 1
    return normed(norm, x).mean((2, 3)) @ weights[f"{classifier}.weight"].T + weights[f"{classifier}.bias"]


@pytest.mark.parametrize("name", ["preactresnet-18", "wrn-16-2", "wrn-10-1"])
def test_preactivation_networks_follow_their_equations(name: str) -> None:
    model = randomize_(build_model(name, num_classes=10)).double().eval()
    x = torch.rand(3, 3, 32, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = preactivation_logits(model.state_dict(), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_every_architecture_is_tested() -> None:
    assert {name.partition("-")[0] for name in NAMES} == set(available())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 64, 64), (1, 8, 8), (5, 33, 47), (2, 1, 1)])
def test_any_size_channels_and_classes(name: str, channels: int, height: int, width: int) -> None:
    model = build_model(name, num_classes=13, channels=channels).eval()
    logits = model(torch.rand(2, channels, height, width))
    assert logits.shape == (2, 13)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_everything(name: str) -> None:
    model = build_model(name, num_classes=4, normalize=(MEAN, STD))
    x = torch.rand(5, 3, 16, 16, requires_grad=True)
    F.cross_entropy(model(x), torch.arange(5) % 4).backward()
    assert x.grad is not None
    assert x.grad.flatten(1).abs().sum(1).gt(0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_layout_copy_and_repetition_leave_the_logits(name: str) -> None:
    model = randomize_(build_model(name, num_classes=10, normalize=(MEAN, STD))).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(7, 3, 32, 32)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(model(x), logits)
        assert torch.equal(copy.deepcopy(model)(x), logits)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_normalisation_is_a_layer_outside_the_state_dict(name: str) -> None:
    plain = build_model(name, num_classes=10).eval()
    model = build_model(name, num_classes=10, normalize=(MEAN, STD)).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    x = torch.rand(3, 3, 32, 32)
    by_hand = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    with torch.no_grad():
        assert torch.equal(model.normalize(x), by_hand)
        assert torch.equal(model(x), plain(by_hand))
    assert next(model.children()) is model.normalize
    assert isinstance(plain.normalize, nn.Identity)
    assert {b.dtype for b in model.double().normalize.buffers()} == {torch.float64}


@pytest.mark.parametrize("name", NAMES)
def test_traceable(name: str) -> None:
    model = randomize_(build_model(name, num_classes=10, normalize=(MEAN, STD))).eval()
    x = torch.rand(3, 3, 16, 16)
    graph = torch.fx.symbolic_trace(model)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))
        torch.testing.assert_close(program.module()(x[:2]), model(x[:2]), rtol=1e-5, atol=1e-5)


def test_initial_weights_of_wrn() -> None:
    model = build_model("wrn-16-4", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            k, outputs = module.kernel_size[0], module.out_channels
            assert module.weight.std().item() == pytest.approx((2 / (k * k * outputs)) ** 0.5, rel=0.02)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
    assert model.fc.bias.eq(0).all()


def test_initial_weights_follow_the_seed() -> None:
    package = example_package()
    torch.manual_seed(3)
    first = build_model("smallresnet-4", num_classes=10)
    torch.manual_seed(3)
    again = build_model("smallresnet-4", num_classes=10)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    bound = package.ResNet18().linear.weight.abs().max().item()
    assert build_model("resnet-18", num_classes=10).linear.weight.abs().max().item() == pytest.approx(
        bound, rel=0.02
    )
