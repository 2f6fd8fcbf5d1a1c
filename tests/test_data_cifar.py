"""CIFAR-10 and CIFAR-100 in each of their forms, and pickles that must not run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_sets import LABELS, PIXELS, picture, read, write, write_tar

from mwpb_fast.data import Config, DataError, cifar, load_split, prepare
from mwpb_fast.data.decode import Arrays, Encoded


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_SPLIT_SIZE", {"train": 10, "test": 4})


def binary_files(name: str) -> dict[str, bytes]:
    coarse = b"\x07" if name == "cifar100" else b""
    records = [coarse + bytes([label]) + pixels.tobytes() for label, pixels in zip(LABELS, PIXELS, strict=True)]
    if name == "cifar100":
        return {"c/train.bin": b"".join(records[:10]), "c/test.bin": b"".join(records[10:])}
    train = {f"c/data_batch_{i + 1}.bin": b"".join(records[2 * i : 2 * i + 2]) for i in range(5)}
    return {**train, "c/test_batch.bin": b"".join(records[10:]), "c/readme.html": b"<html>"}


def python2_batch(labels: np.ndarray, pixels: np.ndarray, key: bytes) -> bytes:
    """A batch in the opcodes of Python 2's cPickle and numpy, as in the published archives."""
    raw = pixels.tobytes()
    shape = b"K" + bytes([len(pixels)]) + b"M" + (3072).to_bytes(2, "little") + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01"
        + shape
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(raw).to_bytes(4, "little")
        + raw
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entry = b"U" + bytes([len(key)]) + key + numbers
    return b"\x80\x02}(" + entry + b"U\x04data" + array + b"U\x0bbatch_labelU\x01xu."


def python_files(name: str, modern: bool = False) -> dict[str, bytes]:
    key = b"fine_labels" if name == "cifar100" else b"labels"

    def batch(part: slice) -> bytes:
        labels, pixels = LABELS[part], PIXELS[part].reshape(-1, 3072)
        if modern:  # saved anew by Python 3, whose keys are text
            return pickle.dumps({key.decode(): labels.tolist(), "data": pixels}, protocol=2)
        return python2_batch(labels, pixels, key)

    if name == "cifar100":
        return {"c/train": batch(slice(0, 10)), "c/test": batch(slice(10, 14)), "c/meta": b"x"}
    train = {f"c/data_batch_{i + 1}": batch(slice(2 * i, 2 * i + 2)) for i in range(5)}
    return {**train, "c/test_batch": batch(slice(10, 14)), "c/batches.meta": b"x"}


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", ["binary", "python", "python3"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_archives(name: str, form: str, packed: bool, tmp_path: Path) -> None:
    files = binary_files(name) if form == "binary" else python_files(name, modern=form == "python3")
    raw = read(write_tar(tmp_path / "x.tar.gz", files) if packed else write(tmp_path / "x", files), name)
    assert isinstance(raw.train, Arrays)
    assert isinstance(raw.test, Arrays)
    assert np.array_equal(np.concatenate([raw.train.images, raw.test.images]).transpose(0, 3, 1, 2), PIXELS)
    assert np.concatenate([raw.train.labels, raw.test.labels]).tolist() == LABELS.tolist()
    assert len(raw.classes) == {"cifar10": 10, "cifar100": 100}[name]
    assert sorted(raw.classes) == list(raw.classes)


def damage(files: dict[str, bytes], kind: str) -> dict[str, bytes]:
    name = next(name for name in files if "train" in name or "data_batch_3" in name)
    content = files[name]
    if kind == "missing":
        return {key: value for key, value in files.items() if "test" not in key}
    if kind == "truncated":
        return {**files, name: content[:-100]}
    if kind == "count":
        return {**files, name: content + content if name.endswith(".bin") else files["c/test_batch"]}
    if kind == "label":
        changed = bytearray(content)
        if name.endswith(".bin"):
            changed[0] = 10
        else:
            changed[changed.index(b"](K") + 3] = 10
        return {**files, name: bytes(changed)}
    assert kind == "rubbish"
    return {**files, name: b"hello"}


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize("form", [binary_files, python_files])
@pytest.mark.parametrize("kind", ["missing", "truncated", "count", "label", "rubbish"])
def test_bad_cifar_archives(form: object, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x", damage(form("cifar10"), kind))  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        read(path, "cifar10")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("small_cifar")
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path: Path) -> None:
    batch = pickle.dumps({"labels": [3, 3.5], "data": PIXELS[:2].reshape(-1, 3072)}, protocol=2)
    with pytest.raises(DataError, match=r"data_batch_1: .*'float' object cannot be interpreted as an integer"):
        read(write(tmp_path, {**python_files("cifar10"), "c/data_batch_1": batch}), "cifar10")


class Malicious:
    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call  # type: ignore[return-value]


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickles_run_nothing(protocol: int, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    attacks = [
        Malicious(os.system, f"touch {witness}"),
        Malicious(exec, f"open({str(witness)!r}, 'w')"),
        Malicious(getattr, "text", "upper"),
        Malicious(np.load, str(witness)),
    ]
    for attack in attacks:
        for batch in (attack, {b"labels": [attack], b"data": attack}, {b"labels": [1, 1], b"data": attack}):
            files = {**python_files("cifar10"), "c/data_batch_1": pickle.dumps(batch, protocol=protocol)}
            with pytest.raises(DataError, match="refused to load") as caught:
                read(write(tmp_path / "x", files), "cifar10")
            assert "data_batch_1" in str(caught.value)
    # what names an allowed class, but as something to call
    call = b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R."
    with pytest.raises(DataError, match="data_batch_1"):
        read(write(tmp_path / "x", {**python_files("cifar10"), "c/data_batch_1": call}), "cifar10")
    assert not witness.exists()


def class_tree() -> dict[str, bytes]:
    classes = cifar._VARIANTS["cifar10"].classes
    return {
        f"{split}/{group}/{i}.jpg": picture(i, (32, 32), form="JPEG")
        for split, count in (("train", 2), ("test", 1))
        for group in classes
        for i in range(count)
    }


def test_cifar_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_SPLIT_SIZE", {"train": 20, "test": 10})
    files = class_tree()
    raw = read(write_tar(tmp_path / "x.tar.xz", files, "w:xz"), "cifar10")
    assert isinstance(raw.train, Encoded)
    assert raw.classes[0] == "airplane"
    assert raw.train.labels.tolist() == [i // 2 for i in range(20)]
    files.pop("train/cat/1.jpg")
    with pytest.raises(DataError, match="class cat: 1 images in the train split, cifar10 has 2"):
        read(write(tmp_path / "short", files), "cifar10")
    for odd, message in (("lynx", "is no class of"), ("cat", "is missing from")):
        changed = {name.replace("/cat/", "/lynx/"): content for name, content in class_tree().items()}
        changed |= class_tree() if odd == "lynx" else {}
        if odd == "cat":
            changed = {name: content for name, content in changed.items() if "lynx" not in name}
        with pytest.raises(DataError, match=f"class {odd} {message} cifar10"):
            read(write(tmp_path / odd, changed), "cifar10")


@pytest.mark.slow
def test_real_cifar10(shared_data: Path, tmp_path: Path) -> None:
    prepare("cifar10", source=shared_data / "cifar10-jpeg.tar.xz", dir=tmp_path)
    config = Config(dir=str(tmp_path))
    train, test = load_split(config, "train"), load_split(config, "test")
    assert torch.bincount(train.labels).tolist() == [5000] * 10
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    pixels = train.images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.4913, 0.4821, 0.4465], abs=5e-5)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx([0.2452, 0.2428, 0.2606], abs=5e-5)
