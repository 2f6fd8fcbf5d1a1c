"""Each data set is read from each of its forms, and refused with the file's name when something is wrong."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mwpb_fast.data import Config, DataError, load_split, prepare
from mwpb_fast.data.archive import open_tree
from mwpb_fast.data.decode import Arrays, RawSet

RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (14, 3, 32, 32), dtype=np.uint8)  # 10 to train on, 4 to test on
LABELS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 0, 8, 9, 7])


def read(path: Path, name: str) -> RawSet:
    from mwpb_fast.data import find_set

    with open_tree(path) as tree:
        return find_set(name).read(tree, name)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def svhn_file(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    from scipy.io import savemat

    out = io.BytesIO()
    savemat(out, {"X": pixels, "y": labels}, do_compression=True)
    return out.getvalue()


def svhn_files() -> dict[str, bytes]:
    labels = np.where(LABELS == 0, 10, LABELS).astype(np.uint8)[:, None]
    pixels = PIXELS.transpose(2, 3, 1, 0)
    return {
        "train_32x32.mat": svhn_file(pixels[..., :10], labels[:10]),
        "test_32x32.mat": svhn_file(pixels[..., 10:], labels[10:]),
    }


def test_svhn(tmp_path: Path) -> None:
    raw = read(write(tmp_path, svhn_files()), "svhn")
    assert isinstance(raw.train, Arrays)
    assert isinstance(raw.test, Arrays)
    assert np.array_equal(raw.train.images.transpose(0, 3, 1, 2), PIXELS[:10])
    assert np.array_equal(raw.test.images.transpose(0, 3, 1, 2), PIXELS[10:])
    assert raw.test.labels.tolist() == LABELS[10:].tolist()
    assert raw.test.labels.dtype == np.int64


@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "rubbish", "empty", "shape", "count", "type", "zero", "eleven"]
)
def test_bad_svhn(kind: str, tmp_path: Path) -> None:
    files = svhn_files()
    x, y = np.zeros((32, 32, 3, 4), np.uint8), np.ones((4, 1), np.uint8)
    good = files.pop("train_32x32.mat")
    bad = {
        "truncated": good[: len(good) // 2],
        "rubbish": b"hello" * 99,
        "empty": b"",
        "shape": svhn_file(x[:31], y),
        "count": svhn_file(x, y[:3]),
        "type": svhn_file(x.astype(np.float64), y),
        "zero": svhn_file(x, y * 0),
        "eleven": svhn_file(x, y * 11),
    }
    if kind in bad:
        files["train_32x32.mat"] = bad[kind]
    with pytest.raises(DataError, match=r"train_32x32\.mat") as caught:
        read(write(tmp_path, files), "svhn")
    assert "\n" not in str(caught.value)


def picture(seed: int, size: tuple[int, int] = (6, 5), mode: str = "RGB", form: str = "PNG") -> bytes:
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint16 if mode == "I;16" else np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def folder_files(test: str = "test", mode: str = "RGB") -> dict[str, bytes]:
    names = [(split, group, i) for split in ("train", test) for group in ("cat", "ant", "bee") for i in range(3)]
    return {f"top/{s}/{g}/{i}.png": picture(k, mode=mode) for k, (s, g, i) in enumerate(names)}


@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_any_folder_of_images(test: str, mode: str, tmp_path: Path) -> None:
    files = folder_files(test, mode)
    meta = prepare("folder", source=write(tmp_path / "x", files), dir=tmp_path)
    assert meta["classes"] == ["ant", "bee", "cat"]
    assert (meta["height"], meta["width"], meta["channels"]) == (5, 6, 3 if mode == "RGB" else 1)
    config = Config(name="folder", dir=str(tmp_path))
    for split, folder in (("train", "train"), ("test", test)):
        images = load_split(config, split)
        assert images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        for i, name in enumerate(sorted(name for name in files if f"/{folder}/" in name)):
            pixels = np.asarray(Image.open(io.BytesIO(files[name]))).reshape(5, 6, -1)
            assert np.array_equal(images.images[i].permute(1, 2, 0).numpy(), pixels)


def test_grayscale_among_colour_becomes_colour(tmp_path: Path) -> None:
    files = {**folder_files(), "top/train/bee/1.png": picture(1, mode="L")}
    prepare("folder", source=write(tmp_path / "x", files), dir=tmp_path)
    image = load_split(Config(name="folder", dir=str(tmp_path)), "train").images[4]
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top/train/bee/1.png": picture(1, size=(6, 6))}, "bee/1.png: is 6x6"),
        ({"top/test/bee/1.png": picture(1, size=(7, 5))}, "bee/1.png: is 7x5"),
        ({"top/train/bee/1.png": b"hello"}, "bee/1.png: not an image"),
        ({"top/train/bee/1.png": b""}, "bee/1.png: not an image"),
        ({"top/train/ant/0.png": b"hello"}, "ant/0.png: not an image"),
        ({"top/train/bee/1.png": picture(1)[:-40]}, "bee/1.png: broken image"),
        ({"top/train/bee/1.png": picture(1, mode="I;16")}, "bee/1.png: pixel format"),
        ({"top/train/bee/notes.txt": b"x"}, "bee/notes.txt: not an image file"),
        ({"top/train/loose.png": picture(1)}, "loose.png: not an image file"),
        ({"top/train/dog/1.png": picture(1)}, "class dog has no images"),
        ({"top/test/dog/1.png": picture(1)}, "class dog is not a class of the training split"),
    ],
)
def test_bad_folders(change: dict[str, bytes], named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=named) as caught:
        prepare("folder", source=write(tmp_path / "x", {**folder_files(), **change}), dir=tmp_path)
    assert str(tmp_path / "x") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "folder" / "meta.json").exists()


def test_folders_without_splits(tmp_path: Path) -> None:
    files = folder_files()
    for missing, message in (("train", "no train/"), ("test", "no test/")):
        part = {name: content for name, content in files.items() if f"/{missing}/" not in name}
        with pytest.raises(DataError, match=message):
            prepare("folder", source=write(tmp_path / missing, part), dir=tmp_path)


def test_nothing_that_is_the_set(tmp_path: Path) -> None:
    source = write(tmp_path / "x", {"readme.txt": b"hello"})
    for name in ("cifar10", "cifar100", "svhn", "tinyimagenet", "folder"):
        with pytest.raises(DataError, match=str(source)):
            prepare(name, source=source, dir=tmp_path)


def tiny_files() -> dict[str, bytes]:
    groups = ("n03", "n01", "n02")
    files = {"t/wnids.txt": "\n".join(groups).encode(), "t/words.txt": b"n01\tone"}
    rows = []
    for g, group in enumerate(groups):
        for i in range(2):
            mode = "L" if i else "RGB"
            files[f"t/train/{group}/images/{group}_{i}.JPEG"] = picture(10 * g + i, (64, 64), mode, "JPEG")
        files[f"t/train/{group}/{group}_boxes.txt"] = (
            f"{group}_0.JPEG\t0\t0\t9\t9\n{group}_1.JPEG\t0\t0\t9\t9\n".encode()
        )
        files[f"t/val/images/val_{g}.JPEG"] = picture(100 + g, (64, 64), form="JPEG")
        rows.append(f"val_{g}.JPEG\t{group}\t0\t0\t9\t9")
    files["t/val/val_annotations.txt"] = "\n".join(rows).encode()
    files["t/test/images/test_0.JPEG"] = picture(7, (64, 64), form="JPEG")
    return files


def test_tinyimagenet_and_subsets(tmp_path: Path) -> None:
    files = tiny_files()
    raw = read(write(tmp_path / "x", files), "tinyimagenet")
    assert raw.classes == ("n01", "n02", "n03")
    assert raw.test.labels.tolist() == [2, 0, 1]
    assert raw.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    by_list = read(write(tmp_path / "y", {**files, "t/wnids.txt": b"n03\nn01\n"}), "tinyimagenet")
    part = {name: content for name, content in files.items() if "/train/n02/" not in name}
    by_folder = read(write(tmp_path / "z", part), "tinyimagenet")
    for raw in (by_list, by_folder):
        assert raw.classes == ("n01", "n03")
        assert raw.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"t/val/val_annotations.txt": None}, r"val_annotations\.txt: missing"),
        ({"t/val/val_annotations.txt": b"val_0.JPEG n01"}, "line 1 is not"),
        ({"t/val/val_annotations.txt": b"\xff\xfe"}, "not a text file"),
        ({"t/val/val_annotations.txt": b"val_0.JPEG\tn01\nval_1.JPEG\tn02\n"}, "class n03 has no images"),
        ({"t/val/images/val_1.JPEG": None}, r"val_1\.JPEG: missing"),
        ({"t/train/n01/images/n01_1.JPEG": None}, r"n01_1\.JPEG: missing"),
        ({"t/train/n01/images/n01_1.JPEG": b"x"}, r"n01_1\.JPEG: not an image"),
        ({"t/train/n01/images/n01_1.JPEG": picture(3, (64, 64), form="JPEG")[:900]}, r"n01_1\.JPEG: broken"),
        ({"t/train/n01/images/n01_1.JPEG": picture(3, (64, 32), form="JPEG")}, r"n01_1\.JPEG: is 64x32"),
        ({"t/wnids.txt": b"n99"}, "none of the classes"),
    ],
)
def test_bad_tinyimagenet(change: dict[str, bytes | None], named: str, tmp_path: Path) -> None:
    files = {name: content for name, content in {**tiny_files(), **change}.items() if content is not None}
    with pytest.raises(DataError, match=named) as caught:
        prepare("tinyimagenet", source=write(tmp_path / "x", files), dir=tmp_path)
    assert str(tmp_path / "x") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_real_tinyimagenet(shared_data: Path, tmp_path: Path) -> None:
    meta = prepare("tinyimagenet", source=shared_data / "tinyimagenet-20.tar.xz", dir=tmp_path)
    assert len(meta["classes"]) == 20
    config = Config(name="tinyimagenet", dir=str(tmp_path))
    train, test = load_split(config, "train"), load_split(config, "test")
    assert train.images.shape == (10_000, 3, 64, 64)
    assert torch.bincount(train.labels).tolist() == [500] * 20
    assert torch.bincount(test.labels).tolist() == [50] * 20
    gray = [int((s.images[:, 0] == s.images[:, 1]).all(-1).all(-1).sum()) for s in (train, test)]
    assert gray[0] >= 39  # the files that are stored as grayscale; some colour files have no colour
    assert gray[1] >= 6


def test_digits() -> None:
    train, test = (load_split(Config(name="digits"), split) for split in ("train", "test"))
    assert train.images.shape == (1438, 1, 8, 8)
    assert test.images.shape == (359, 1, 8, 8)
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    everything = torch.cat([train.images, test.images]).flatten(1).sort(0).values
    assert torch.equal(everything, torch.from_numpy(pixels * 255 / 16).round().to(torch.uint8).sort(0).values)
    assert (torch.bincount(test.labels) / torch.bincount(torch.from_numpy(labels)) - 0.2).abs().max() < 0.01
    assert int(train.images.max()) == 255
