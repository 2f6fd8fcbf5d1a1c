"""Layouts of folder sets: what is found, and that nothing is dropped, renamed or renumbered without a word."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from test_data_sets import PIXELS, folder_files, picture, read, svhn_file, svhn_files, tiny_files, write, write_tar

from mwpb_fast.data import Config, DataError, load_split, prepare
from mwpb_fast.data.decode import Encoded


def prepared(tmp_path: Path, files: dict[str, bytes], name: str = "folder") -> tuple[dict[str, object], list[str]]:
    told: list[str] = []
    return prepare(name, source=write(tmp_path / "x", files), dir=tmp_path / "data", tell=told.append), told


def renamed(files: dict[str, bytes], **names: str) -> dict[str, bytes]:
    """Files with folders renamed, whole names only."""
    return {"/".join(names.get(part, part) for part in path.split("/")): data for path, data in files.items()}


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["Test", "testing", "VAL", "valid", "Validation"])
def test_splits_by_their_usual_names(train: str, test: str, tmp_path: Path) -> None:
    meta, told = prepared(tmp_path, renamed(folder_files(), train=train, test=test))
    assert meta["classes"] == ["ant", "bee", "cat"]
    assert not told


def test_a_split_in_two_folders_is_refused(tmp_path: Path) -> None:
    files = folder_files() | renamed(folder_files(), test="Test")
    with pytest.raises(DataError, match="both top/Test and top/test are there"):
        prepared(tmp_path, files)


def test_images_that_are_not_used_are_said(tmp_path: Path) -> None:
    files = folder_files() | renamed(folder_files(), test="val")
    _, told = prepared(tmp_path, {**files, "top/train/.more/0.png": picture(3), "top/docs/a.txt": b"text"})
    assert told == [
        "top/val/ holds images that are not used: the test split is top/test/",
        f"1 hidden images are not used (the first: {tmp_path}/x/top/train/.more/0.png)",
    ]


def test_images_below_a_class_folder_are_found_and_said(tmp_path: Path) -> None:
    files = folder_files()
    files |= {f"top/train/bee/deep/er/{i}.png": picture(50 + i) for i in range(2)}
    meta, told = prepared(tmp_path, files)
    assert meta["splits"]["train"]["count"] == 11  # type: ignore[index]
    assert len(told) == 1
    assert told[0].startswith("2 images in folders below their class's folder are of that class")
    assert told[0].endswith("bee/deep/er/0.png)")
    labels = load_split(Config(name="folder", dir=str(tmp_path / "data")), "train").labels
    assert labels.bincount().tolist() == [3, 5, 3]


def test_what_systems_leave_in_a_set_is_ignored(tmp_path: Path) -> None:
    left = ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg")
    files = folder_files() | {f"top/{where}/{name}": b"x" for where in ("train", "train/ant") for name in left}
    meta, told = prepared(tmp_path, files)
    assert meta["classes"] == ["ant", "bee", "cat"]
    assert not told


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_folder_is_named(split: str, tmp_path: Path) -> None:
    (tmp_path / "x" / "top" / split / "eel").mkdir(parents=True)
    (tmp_path / "x" / "top" / split / "eel" / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(DataError, match=f"top/{split}/eel: class eel has no images"):
        prepared(tmp_path, folder_files())


def test_an_empty_class_folder_in_an_archive_is_named(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in folder_files().items():
            file.writestr(name, content)
        file.writestr("top/train/eel/", b"")
    with pytest.raises(DataError, match="class eel has no images"):
        prepare("folder", source=path, dir=tmp_path)


def test_one_class_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in folder_files().items() if "/cat/" in name}
    with pytest.raises(DataError, match="has one class, cat"):
        prepared(tmp_path, files)


def test_the_order_of_numbers_and_names_in_two_cases_is_said(tmp_path: Path) -> None:
    meta, told = prepared(tmp_path / "a", renamed(folder_files(), ant="10", bee="2", cat="1"))
    assert meta["classes"] == ["1", "10", "2"]
    assert told == ["classes are numbered in the order of their names as text: 1, 10, 2, ..."]
    _, told = prepared(tmp_path / "b", renamed(folder_files(), ant="Cat"))
    assert told == ["classes Cat and cat differ in nothing but case"]


def test_accents_in_two_forms_are_one_name(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    files = renamed(folder_files(), cat=composed)
    files = {name.replace(composed, apart) if "/test/" in name else name: data for name, data in files.items()}
    meta, _ = prepared(tmp_path / "a", files)
    assert meta["classes"] == ["ant", "bee", composed]
    more = {f"top/train/{apart}/0.png": picture(1)}
    with pytest.raises(DataError, match="two forms of Unicode"):
        prepared(tmp_path / "b", renamed(folder_files(), cat=composed) | more)


def test_very_many_classes_and_images_of_one_pixel(tmp_path: Path) -> None:
    pixel = picture(1, size=(1, 1))
    meta, told = prepared(tmp_path, {f"{s}/c{i:04d}/0.png": pixel for s in ("train", "test") for i in range(600)})
    assert len(meta["classes"]) == 600  # type: ignore[arg-type]
    assert not told
    images = load_split(Config(name="folder", dir=str(tmp_path / "data")), "train")
    assert images.images.shape == (600, 3, 1, 1)
    assert images.labels.tolist() == list(range(600))


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take names in UTF-8 only")
def test_names_that_are_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from mwpb_fast import cli

    odd = "d\udce9"  # the byte 0xe9 alone
    source = write(tmp_path / odd / "x", renamed(folder_files(), cat=f"cat{odd}"))
    words = ["data", "prepare", "folder", "--from", str(source), "--dir", str(tmp_path / odd / "data")]
    assert cli.main(words) == 0
    assert "of 3 classes, in " in capfd.readouterr().out
    images = load_split(Config(name="folder", dir=str(tmp_path / odd / "data")), "train")
    assert images.classes == ("ant", "bee", f"cat{odd}")


# Tiny-ImageNet --------------------------------------------------------------------------------------------------
def reorganised(below: str, annotations: bool) -> dict[str, bytes]:
    files = {}
    for name, content in tiny_files().items():
        if name.startswith("t/val/images/"):
            group = ("n03", "n01", "n02")[int(name[-6])]
            name = f"t/val/{group}/{below}{name.rsplit('/', 1)[-1]}"
        if annotations or "annotations" not in name:
            files[name] = content
    return files


@pytest.mark.parametrize("below", ["", "images/"])
@pytest.mark.parametrize("annotations", [True, False])
def test_tinyimagenet_with_val_by_class(below: str, annotations: bool, tmp_path: Path) -> None:
    files = reorganised(below, annotations)
    raw = read(write(tmp_path / "x", files), "tinyimagenet")
    original = read(write(tmp_path / "y", tiny_files()), "tinyimagenet")
    assert raw.classes == original.classes
    assert not raw.notes
    assert isinstance(raw.test, Encoded)
    assert isinstance(original.test, Encoded)
    assert raw.test.labels.tolist() == [0, 1, 2]
    pairs = [
        sorted(zip(t.labels.tolist(), map(bytes, t.contents), strict=True)) for t in (raw.test, original.test)
    ]
    assert pairs[0] == pairs[1]
    if annotations:
        lost = next(name for name in files if name.startswith("t/val/n01"))
        (tmp_path / "x" / lost).unlink()
        (tmp_path / "x" / "t" / "val" / "n01" / "other.JPEG").write_bytes(files[lost])
        with pytest.raises(DataError, match=r"val_1\.JPEG: missing"):
            read(tmp_path / "x", "tinyimagenet")


def test_tinyimagenet_with_train_without_images_folders(tmp_path: Path) -> None:
    files = {name.replace("/images/", "/") if "/train/" in name else name: c for name, c in tiny_files().items()}
    assert read(write(tmp_path, files), "tinyimagenet").train.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_tinyimagenet_with_byte_order_marks_loses_no_class(tmp_path: Path) -> None:
    files = tiny_files()
    for name in ("t/wnids.txt", "t/val/val_annotations.txt", "t/train/n01/n01_boxes.txt"):
        files[name] = b"\xef\xbb\xbf" + files[name].replace(b"\n", b"\r\n")
    raw = read(write(tmp_path, files), "tinyimagenet")
    assert raw.classes == ("n01", "n02", "n03")
    assert raw.test.labels.tolist() == [2, 0, 1]


def test_classes_of_tinyimagenet_that_are_left_out_are_said(tmp_path: Path) -> None:
    files = tiny_files()
    part = {name: content for name, content in files.items() if "/train/n02/" not in name}
    assert read(write(tmp_path / "x", part), "tinyimagenet").notes == (
        "1 classes of wnids.txt are left out: not both of wnids.txt and train/ have n02",
        "1 classes of val/ are left out: not both of wnids.txt and train/ have n02",
    )
    few = {**files, "t/wnids.txt": b"n03\nn01\n", "t/train/n01/images/more.JPEG": picture(1, (64, 64))}
    assert read(write(tmp_path / "y", few), "tinyimagenet").notes == (
        "1 classes of train/ are left out: not both of wnids.txt and train/ have n02",
        "1 classes of val/ are left out: not both of wnids.txt and train/ have n02",
        "classes have 2 (n03) to 3 training images, not equally many",
    )


def test_an_empty_class_of_tinyimagenet_is_named(tmp_path: Path) -> None:
    tree = {name: content for name, content in tiny_files().items() if "/train/n02/images" not in name}
    with pytest.raises(DataError, match="train/n02: class n02 has no images"):
        read(write(tmp_path, tree), "tinyimagenet")


# labels ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("label", [3.5, np.nan, np.inf])
def test_svhn_labels_that_are_no_whole_numbers(label: float, tmp_path: Path) -> None:
    labels = np.full((10, 1), 3.0)
    labels[4] = label
    files = svhn_files() | {"train_32x32.mat": svhn_file(PIXELS.transpose(2, 3, 1, 0)[..., :10], labels)}
    with pytest.raises(DataError, match=r"train_32x32\.mat: label (3\.5|nan|inf)") as caught:
        read(write(tmp_path, files), "svhn")
    assert "\n" not in str(caught.value)


def test_a_class_without_images_in_one_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"class \d has no images in the (train|test) split"):
        prepare("svhn", source=write(tmp_path / "x", svhn_files()), dir=tmp_path)


def test_a_set_in_a_tar_is_the_set_in_its_folder(tmp_path: Path) -> None:
    meta, _ = prepared(tmp_path, folder_files())
    other = prepare("folder", source=write_tar(tmp_path / "x.tgz", folder_files()), dir=tmp_path / "other")
    assert meta["splits"] == other["splits"]
