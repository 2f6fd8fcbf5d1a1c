"""Input that is hostile by chance, files damaged anywhere and absurd options: one line, or the right thing."""

from __future__ import annotations

import gzip
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from test_data_archive import CONTENT, tar_bytes, zip_bytes
from test_data_images import RGB, saved
from test_data_prepare import svhn_files
from test_data_sets import folder_files, write

from mwpb_fast import options
from mwpb_fast.config import ConfigError
from mwpb_fast.data import DataError, prepare
from mwpb_fast.data.archive import open_tree

QUICK, SLOW = 12, 400
slow = pytest.mark.slow
TRIES = [QUICK, pytest.param(SLOW, marks=slow)]
PICTURES: dict[str, Callable[[], bytes]] = {
    "png": lambda: saved(RGB),
    "jpg": lambda: saved(RGB, "JPEG"),
    "bmp": lambda: saved(RGB, "BMP"),
    "webp": lambda: saved(RGB, "WEBP", lossless=True),
    "gif": lambda: saved(RGB, "GIF"),
    "ppm": lambda: saved(RGB, "PPM"),
}


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Bits turned, a piece cut off, left out, put in or blanked out."""
    at, size = dice.randrange(len(content)), 1 + dice.randrange(40)
    return dice.choice(
        [
            content[:at] + bytes([content[at] ^ (1 << dice.randrange(8))]) + content[at + 1 :],
            content[:at],
            content[:at] + content[at + size :],
            content[:at] + dice.randbytes(size) + content[at:],
            content[:at] + dice.choice([b"\0", b"\xff"]) * size + content[at + size :],
        ]
    )


def survives(name: str, work: Callable[[], object]) -> None:
    """It is done, or refused in one line that names the file."""
    said = name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a library's warning is a line that nobody asked for
            work()
    except DataError as error:
        said = str(error)
    assert name in said
    assert "\n" not in said


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("kind", PICTURES)
def test_a_damaged_image(
    kind: str, tries: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    dice, good = random.Random(kind), PICTURES[kind]()
    source = write(tmp_path / "x", folder_files())
    (source / "top" / "train" / "ant" / "0.png").unlink()
    path = source / "top" / "train" / "ant" / f"first.{kind}"
    for _ in range(tries):
        path.write_bytes(damaged(good, dice))
        survives(str(path.name), lambda: prepare("folder", source=source, dir=tmp_path / "data", replace=True))
    record_property("cases", tries)


@pytest.mark.parametrize("tries", TRIES)
def test_a_damaged_mat_file(tries: int, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    dice, name = random.Random(0), "train_32x32.mat"
    source = write(tmp_path / "x", svhn_files())
    path = next(source.rglob(name))
    good = path.read_bytes()
    for _ in range(tries):
        path.write_bytes(damaged(good, dice))
        survives(name, lambda: prepare("svhn", source=source, dir=tmp_path / "data", replace=True))
    record_property("cases", tries)


@pytest.mark.parametrize("tries", TRIES)
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_damaged_archive(
    kind: str, tries: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    dice, members = random.Random(kind), list(CONTENT.items())
    good = zip_bytes(*members) if kind == "zip" else tar_bytes(*members)
    good = gzip.compress(good, mtime=0) if kind == "tar.gz" else good
    path = tmp_path / f"hurt.{kind}"

    def read_all() -> None:
        with open_tree(path) as tree:
            for name in tree.names:
                tree.read(name)

    for _ in range(tries):
        path.write_bytes(damaged(good, dice))
        survives("hurt", read_all)
    record_property("cases", tries)


def test_random_bytes_are_no_set(tmp_path: Path) -> None:
    dice = random.Random(0)
    for number in range(QUICK):
        path = tmp_path / f"noise{number}"
        path.write_bytes(dice.randbytes(dice.randrange(2000)))
        for name in ("cifar10", "svhn", "folder", "tinyimagenet"):
            with pytest.raises(DataError, match=f"noise{number}") as caught:
                prepare(name, source=path, dir=tmp_path / "data")
            assert "\n" not in str(caught.value)


NUMBERS = ("-1", "0", "1e309", "nan", "-inf", "99999999999999999999", "8/0", "1/255")
TEXTS = ("", "x", "[]", "[1,", "null", "{}", "\u202e", "a: b", "--", "true", "1,2", "../../etc/passwd")
ABSURD = (*NUMBERS, *TEXTS, "!!python/object/apply:os.mkdir [executed]")


@pytest.mark.parametrize("share", [0.02, pytest.param(1.0, marks=slow)])
def test_absurd_options(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Every option with every absurd value: a configuration, or one line; and nothing is made or run."""
    monkeypatch.chdir(tmp_path)
    dice, tried = random.Random(0), 0
    names = [name for name, _ in options.values_of(options.find_recipe("digits.mwpb_mart"))]
    for name in names:
        for value in ABSURD:
            if dice.random() > share:
                continue
            tried, said = tried + 1, ""
            try:
                options.configure("digits.mwpb_mart", {}, [f"--{name}={value}"])
            except (ConfigError, DataError) as error:
                said = str(error)
            assert "\n" not in said, (name, value)
    assert not list(tmp_path.iterdir())
    record_property("cases", tried)


def test_images_with_nan_are_refused() -> None:
    """Where they come from outside; those of a data set are bytes."""
    import torch

    from mwpb_fast.evaluation.contract import check_images
    from mwpb_fast.evaluation.model_checks import EvaluationError

    for value in (float("nan"), float("inf"), -0.1, 1.1):
        x = torch.rand(3, 1, 4, 4)
        x[1, 0, 2, 2] = value
        with pytest.raises(EvaluationError) as caught:
            check_images(x)
        assert "\n" not in str(caught.value)
