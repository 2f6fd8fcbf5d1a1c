"""Files of the field's models, by names and shapes as their programs write them: each fits ours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from test_models import meta, randomize_
from torch import Tensor

from mwpb_fast.models import build_model, load_weights

Shapes = dict[str, tuple[int, ...]]


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


def stages(widths: list[int], count: int) -> Iterator[tuple[int, int, int, int]]:
    """Stage, block, channels in and out."""
    inputs = widths[0]
    for i, width in enumerate(widths[1:]):
        for j in range(count):
            yield i, j, inputs, width
            inputs = width


def resnet18(preactivation: bool) -> Shapes:
    found: Shapes = {"conv1.weight": (64, 3, 3, 3), "linear.weight": (10, 512), "linear.bias": (10,)}
    found |= norm("bn", 512) if preactivation else norm("bn1", 64)
    for i, j, inputs, width in stages([64, 64, 128, 256, 512], 2):
        block = f"layer{i + 1}.{j}"
        found |= {f"{block}.conv1.weight": (width, inputs, 3, 3), f"{block}.conv2.weight": (width, width, 3, 3)}
        found |= norm(f"{block}.bn1", inputs if preactivation else width) | norm(f"{block}.bn2", width)
        if inputs != width:
            found[f"{block}.shortcut.0.weight"] = (width, inputs, 1, 1)
            found |= {} if preactivation else norm(f"{block}.shortcut.1", width)
    return found


def wrn_34_10() -> Shapes:
    found: Shapes = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 640), "fc.bias": (10,)} | norm("bn1", 640)
    for i, j, inputs, width in stages([16, 160, 320, 640], 5):
        for name in (f"block{i + 1}", "sub_block1") if i == 0 else (f"block{i + 1}",):
            block = f"{name}.layer.{j}"
            found |= {
                f"{block}.conv1.weight": (width, inputs, 3, 3),
                f"{block}.conv2.weight": (width, width, 3, 3),
            }
            found |= norm(f"{block}.bn1", inputs) | norm(f"{block}.bn2", width)
            found |= {f"{block}.convShortcut.weight": (width, inputs, 1, 1)} if inputs != width else {}
    return found


def wrn_28_10_silu() -> Shapes:
    found: Shapes = {"init_conv.weight": (16, 3, 3, 3), "logits.weight": (10, 640), "logits.bias": (10,)}
    found |= norm("batchnorm", 640)
    for i, j, inputs, width in stages([16, 160, 320, 640], 4):
        block = f"layer.{i}.block.{j}"
        found |= {f"{block}.conv_0.weight": (width, inputs, 3, 3), f"{block}.conv_1.weight": (width, width, 3, 3)}
        found |= norm(f"{block}.batchnorm_0", inputs) | norm(f"{block}.batchnorm_1", width)
        found |= {f"{block}.shortcut.weight": (width, inputs, 1, 1)} if inputs != width else {}
    return found


def tensors(shapes: Shapes, prefix: str = "") -> dict[str, Tensor]:
    """Of one number each, whatever their size."""
    return {prefix + name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


IMAGES = {"mean": torch.tensor([0.4914, 0.4822, 0.4465]), "std": torch.tensor([0.2471, 0.2435, 0.2616])}
FILES = {
    "RobustBench, ResNet-18": ("resnet-18", lambda: tensors(resnet18(False), "model.") | normalized("normalize.")),
    "TRADES, ResNet-18 in parallel": ("resnet-18", lambda: tensors(resnet18(False), "module.")),
    "MART, ResNet-18": ("resnet-18", lambda: {"state_dict": tensors(resnet18(False)), "epoch": 90}),
    "MAIL, ResNet-18": ("resnet-18", lambda: {"model": tensors(resnet18(False), "module."), "optimizer": {}}),
    "AWP, PreActResNet-18": ("preactresnet-18", lambda: {"state_dict": tensors(resnet18(True), "module.1.")}),
    "RobustBench, PreActResNet-18": ("preactresnet-18", lambda: tensors(resnet18(True))),
    "TRADES, WRN-34-10": ("wrn-34-10", lambda: tensors(wrn_34_10())),
    "AWP, WRN-34-10": ("wrn-34-10", lambda: {"state_dict": tensors(wrn_34_10(), "module.")}),
    "DM-Improves-AT, WRN-28-10": (
        "wrnsilu-28-10",
        lambda: {
            "model_state_dict": tensors(wrn_28_10_silu(), "module.0."),
            "scheduler_state_dict": {},
            "epoch": 1,
        },
    ),
    "RobustBench, WRN-28-10 with SiLU": ("wrnsilu-28-10", lambda: tensors(wrn_28_10_silu())),
}


def normalized(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value.view(1, 3, 1, 1) for name, value in IMAGES.items()}


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_the_field_fits(file: str) -> None:
    name, make = FILES[file]
    loaded = load_weights(meta(name), make())
    assert all("sub_block1" in left for left in loaded.left_out)
    assert (loaded.normalize is not None) is ("ResNet-18" in file and file.startswith("RobustBench, R"))


def test_wrn_with_silu_is_that_of_its_files() -> None:
    """By hand, from its weights."""
    model = randomize_(build_model("wrnsilu-10-2", num_classes=7)).double().eval()
    w = model.state_dict()

    def act(x: Tensor, name: str) -> Tensor:
        values = (w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *values)
        return x * torch.sigmoid(x)

    x = images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    x = F.conv2d(x, w["init_conv.weight"], padding=1)
    for i, stride in enumerate((1, 2, 2)):
        block = f"layer.{i}.block.0"
        x = act(x, f"{block}.batchnorm_0")
        padded = F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        out = act(F.conv2d(padded, w[f"{block}.conv_0.weight"], stride=stride), f"{block}.batchnorm_1")
        x = F.conv2d(x, w[f"{block}.shortcut.weight"], stride=stride) + F.conv2d(
            out, w[f"{block}.conv_1.weight"], padding=1
        )
    pooled = act(x, "batchnorm").mean((2, 3))
    torch.testing.assert_close(model(images), pooled @ w["logits.weight"].T + w["logits.bias"])
