"""Prepared sets: image files kept as they came, damage, descriptions that do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from test_data_prepare import svhn_files
from test_data_sets import folder_files, picture, write

from mwpb_fast.data import (
    Config,
    DataError,
    DataWriteError,
    load_encoded,
    load_split,
    prepare,
    require_prepared,
)


@pytest.fixture
def pets(tmp_path: Path) -> Config:
    prepare("folder", source=write(tmp_path / "x", folder_files()), dir=tmp_path, encoded=True)
    return Config(name="folder", dir=str(tmp_path))


def test_encoded_files_are_kept_in_order(pets: Config, tmp_path: Path) -> None:
    packed = load_encoded(pets)
    files = sorted((name, content) for name, content in folder_files().items() if "/train/" in name)
    assert packed is not None
    assert [packed[i].tobytes() for i in range(len(packed))] == [content for _, content in files]
    assert not list(tmp_path.rglob("*.tmp"))


def test_encoded_needs_image_files(tmp_path: Path) -> None:
    source = write(tmp_path / "x", svhn_files())
    with pytest.raises(DataError, match="holds arrays"):
        prepare("svhn", source=source, dir=tmp_path, encoded=True)
    prepare("svhn", source=source, dir=tmp_path)
    assert load_encoded(Config(name="svhn", dir=str(tmp_path))) is None
    assert load_encoded(Config(name="digits")) is None


def test_a_missing_set_tells_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="run `mwpb-fast data prepare cifar10 --dir '/no where'` first, or say"):
        load_split(Config(dir="/no where"), "train")
    with pytest.raises(DataError, match=r"missing; run `mwpb-fast data prepare cifar10` first, or say"):
        require_prepared(Config(dir="data"))
    require_prepared(Config(name="digits"))
    with pytest.raises(DataError, match="does not exist"):
        prepare("cifar10", source=tmp_path / "gone", dir=tmp_path)
    with pytest.raises(DataError, match="--data-dir"):
        prepare("folder", dir=tmp_path)
    with pytest.raises(ValueError, match="split is 'val'"):
        load_split(Config(name="digits"), "val")


@pytest.mark.parametrize("name", ["train.safetensors", "train.encoded.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "flipped", "other"])
def test_damaged_files_are_detected(pets: Config, name: str, kind: str) -> None:
    path = Path(pets.dir) / "folder" / name
    content = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    elif kind == "flipped":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif kind == "other":
        path.write_bytes((path.parent / "test.safetensors").read_bytes())
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        load_encoded(pets) if "encoded" in name else load_split(pets, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"format": 9}', "\x00"])
def test_a_damaged_description_is_detected(pets: Config, content: str) -> None:
    path = Path(pets.dir) / "folder" / "meta.json"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        load_split(pets, "train")


@pytest.mark.parametrize("change", [{"height": 7}, {"classes": ["ant", "bee"]}])
def test_a_description_that_does_not_fit_is_detected(pets: Config, change: dict[str, object]) -> None:
    path = Path(pets.dir) / "folder" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"]  # as an older version wrote it, without a sum of itself
    path.write_text(json.dumps(meta | change))
    with pytest.raises(DataError, match=r"train\.safetensors"):
        load_split(pets, "train")


def test_a_failed_preparation_leaves_the_old_one(
    pets: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_split(pets, "train").images.clone()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    other = write(tmp_path / "y", {**folder_files(), "top/train/bee/9.png": picture(99)})
    monkeypatch.setattr("mwpb_fast.data.store.sync", full)
    with pytest.raises(DataWriteError, match="No space left on device"):
        prepare("folder", source=other, dir=tmp_path, replace=True)
    assert torch.equal(load_split(pets, "train").images, before)
    assert not list(tmp_path.rglob("*.tmp"))


def test_digits_need_no_preparation(tmp_path: Path) -> None:
    assert prepare("digits", dir=tmp_path)["splits"] == {"train": {"count": 1438}, "test": {"count": 359}}
    assert not list(tmp_path.iterdir())
