"""Names of models and their options: what is refused, and code from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mwpb_fast.models import available, build_model, parse_name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg-16", f"unknown model 'vgg-16'; available: {', '.join(available())}"),
        ("_layers-1", r"unknown model"),
        ("resnet18", r"unknown model 'resnet18'; available: .*; did you mean resnet-18\?$"),
        ("WRN-28-10", r"did you mean wrn-28-10\?$"),
        ("wrn2810", r"available: .* \(such as wrn-34-10\)$"),
        ("wrn-34x10", r"not of the form"),
        ("../resnet-18", r"not of the form"),
        ("", r"not of the form"),
        ("resnet-19", r"resnet has depths 18, 34, 50, not 19"),
        ("preactresnet-50", r"preactresnet has depths 18, 34, not 50"),
        ("wrn-34", r"write wrn-<depth>-<width>"),
        ("resnet", r"write resnet-<depth>"),
        ("resnet-18-2", r"write resnet-<depth>"),
        ("wrn-35-10", r"depth of 6n \+ 4"),
        ("wrn-4-10", r"depth of 6n \+ 4"),
        ("wrn-0-10", r"depth of 6n \+ 4"),
        ("wrn-34-0", r"width of at least 1"),
        ("smallresnet-0", r"width of at least 1"),
        ("no_such_package.model-1", r"no module named 'no_such_package'"),
        ("os.path", r"no build"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_model(name, num_classes=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        (((0.5,), (0.5,)), "3 means and deviations, not 1 and 1"),
        (((0.5,) * 3, (0.5, 0.0, 0.5)), "positive deviations"),
        (((float("nan"),) * 3, (0.5,) * 3), "finite means"),
    ],
)
def test_bad_normalisation(normalize, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model("smallresnet-2", num_classes=10, normalize=normalize)


def test_outside_code_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mwpb_outside").mkdir()
    (tmp_path / "mwpb_outside" / "__init__.py").touch()
    (tmp_path / "mwpb_outside" / "flat.py").write_text(
        "from torch import nn\n"
        "def build(size, *, num_classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = build_model("mwpb_outside.flat-4", num_classes=3, channels=1)
    assert model(torch.rand(2, 1, 4, 4)).shape == (2, 3)
    with pytest.raises(ValueError, match="no `normalize` layer"):
        build_model("mwpb_outside.flat-4", num_classes=3, channels=1, normalize=((0.5,), (0.5,)))


def test_names_are_checked_without_torch() -> None:
    assert available() == ["preactresnet", "resnet", "smallresnet", "wrn", "wrnsilu"]
    assert parse_name("wrn-34-10") == ("mwpb_fast.models.wrn", (34, 10))
    code = "import sys; from mwpb_fast.models import parse_name; parse_name('wrn-34-10'); print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()
