"""Weights from files: the field's variants, refusals, hostile and damaged checkpoints."""

from __future__ import annotations

import copy
import os
import pickle
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_models import randomize_

from mwpb_fast.models import build_model, load_weights, read_checkpoint

NAMES = ["resnet-18", "preactresnet-18", "wrn-10-2", "smallresnet-5"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "vary",
    [
        lambda sd: sd,
        lambda sd: {f"module.{k}": v for k, v in sd.items()},
        lambda sd: {f"model.{k}": v for k, v in sd.items()},
        lambda sd: {f"module.model.{k}": v for k, v in sd.items()},
        lambda sd: {"state_dict": sd, "epoch": 3},
        lambda sd: {"model": {f"module.{k}": v for k, v in sd.items()}, "optimizer": {}},
        lambda sd: {"net": sd, "acc": 0.5},
        lambda sd: {"model": {"state_dict": sd}},
        lambda sd: sd | {k.replace("block1", "sub_block1", 1): v for k, v in sd.items() if "block1" in k},
        lambda sd: sd | {"normalize.mean": torch.zeros(3), "std": torch.ones(1, 3, 1, 1), "mu": torch.zeros(3)},
        lambda sd: {k: v for k, v in sd.items() if "num_batches_tracked" not in k},
        lambda sd: {k: v.half() if v.is_floating_point() else v for k, v in sd.items()},
    ],
)
def test_load_weights_accepts_the_field_variants(vary) -> None:
    weights = randomize_(build_model("wrn-10-1", num_classes=10)).half().float().state_dict()
    target = build_model("wrn-10-1", num_classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(target, vary(dict(weights)))
    assert {v.dtype for v in target.parameters()} == {torch.float32}
    assert all(torch.equal(value, weights[key]) for key, value in target.state_dict().items())


def test_normalisation_of_a_file_is_applied() -> None:
    weights = build_model("smallresnet-2", num_classes=10).state_dict()
    buffers = {"mu": torch.tensor(MEAN).view(1, 3, 1, 1), "sigma": torch.tensor(STD).view(1, 3, 1, 1)}
    x, logits = torch.rand(2, 3, 8, 8), []
    for normalize in ((MEAN, STD), None):
        model = build_model("smallresnet-2", num_classes=10, normalize=normalize).eval()
        loaded = load_weights(model, weights | buffers)
        assert loaded.normalize is not None
        torch.testing.assert_close(torch.tensor(loaded.normalize), torch.tensor((MEAN, STD)))
        logits.append(model(x))
    assert torch.equal(*logits)
    plain = build_model("smallresnet-2", num_classes=10).eval()
    load_weights(plain, weights)
    assert not torch.allclose(plain(x), logits[0])
    with pytest.raises(
        ValueError, match=r"mu, sigma is mean 0\.4914.*the model's mean 0\.5.*leave --model\.normal"
    ):
        load_weights(build_model("smallresnet-2", num_classes=10, normalize=((0.5,) * 3, STD)), weights | buffers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: {k: v for k, v in sd.items() if k != "fc.bias"}, r"missing fc\.bias$"),
        (lambda sd: {}, r"missing conv1\.weight, block1\.layer\.0\.bn1\.weight, .* and \d+ more$"),
        (lambda sd: sd | {"linear.bias": sd["fc.bias"]}, r"unexpected linear\.bias$"),
        (
            lambda sd: sd | {"fc.weight": torch.zeros(7, 64)},
            r"wrong shape fc\.weight \(7, 64\) for \(10, 64\)$",
        ),
        (lambda sd: sd | {"fc.weight": [1.0]}, r"fc\.weight holds list, not a tensor$"),
        (lambda sd: sd | {"epoch": 3}, r"epoch holds int, not a tensor$"),
        (lambda sd: sd | {"module.fc.bias": sd["fc.bias"]}, r"fc\.bias occurs twice"),
    ],
)
def test_load_weights_refuses_and_leaves_the_model(change, message: str) -> None:
    model = build_model("wrn-10-1", num_classes=10)
    before = copy.deepcopy(model.state_dict())
    other = build_model("wrn-10-1", num_classes=10).state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, change(dict(other)))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_read_checkpoint_formats(tmp_path: Path) -> None:
    weights = build_model("smallresnet-3", num_classes=10).state_dict()
    torch.save(weights, tmp_path / "plain.pt")
    torch.save(
        {"net": weights, "epoch": 3, "acc": 0.5}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    save_file(weights, tmp_path / "new.safetensors")
    for name in ("plain.pt", "old.pth", "new.safetensors"):
        model = build_model("smallresnet-3", num_classes=10)
        load_weights(model, read_checkpoint(tmp_path / name))
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pth", "raw.pkl", "raw.safetensors"])
@pytest.mark.parametrize("nested", [False, True])
def test_read_checkpoint_never_runs_code(tmp_path: Path, name: str, nested: bool) -> None:
    witness, path = tmp_path / "executed", tmp_path / name
    content = {"state_dict": {"a": torch.zeros(2)}, "extra": Hostile(witness)} if nested else Hostile(witness)
    if name.startswith("raw"):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name.startswith("zip"))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_checkpoint(path)
    assert not witness.exists()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_read_checkpoint_names_a_bad_file(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(1000)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    save_file({"a": torch.arange(1000)}, tmp_path / "good.safetensors")
    cases = {
        "empty.pt": b"",
        "noise.pt": bytes(range(256)),
        "half.pt": good[: len(good) // 2],
        "list.pt": (tmp_path / "list.pt").read_bytes(),
        "empty.safetensors": b"",
        "half.safetensors": (tmp_path / "good.safetensors").read_bytes()[:-8],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.pt").mkdir()
    for name in [*cases, "folder.pt", "absent.pt", "absent.safetensors"]:
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value), name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["zip.pt", "legacy.pth", "flat.safetensors"])
def test_read_checkpoint_survives_damage(tmp_path: Path, name: str) -> None:
    path, generator = tmp_path / name, random.Random(0)
    weights = {"w": torch.zeros(2, 3), "b": torch.arange(3)}
    if name.endswith("safetensors"):
        save_file(weights, path)
    else:
        torch.save({"net": weights, "epoch": 3}, path, _use_new_zipfile_serialization=name == "zip.pt")
    good = path.read_bytes()
    messages = []
    for _ in range(300):
        damaged = bytearray(good)
        damaged[generator.randrange(len(good))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(str(path) in message and "\n" not in message for message in messages)
