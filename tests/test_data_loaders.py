"""The two loaders: the same batches in the same order, from any start, with any number of threads."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mwpb_fast.data import (
    Batch,
    Config,
    DataError,
    Images,
    ResidentLoader,
    epoch_order,
    eval_batches,
    load_encoded,
    load_split,
    make_loader,
    prepare,
    split_indices,
)
from mwpb_fast.data.dali import DaliLoader
from mwpb_fast.data.decode import Packed


def has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


needs_dali = pytest.mark.skipif(not has_dali(), reason="needs NVIDIA DALI")
CONFIG = Config(name="some", batch_size=8, pad=2, last_batch="keep")
RNG = np.random.default_rng(11)


def some_images(n: int = 45, channels: int = 3, height: int = 9, width: int = 7) -> Images:
    pixels = torch.from_numpy(RNG.integers(0, 256, (n, channels, height, width), dtype=np.uint8))
    return Images(pixels, torch.arange(n) % 5, tuple("abcde"), origin="some.file")


def packed(images: Images, form: str = "PNG", quality: int = 90) -> Packed:
    files = []
    for pixels in images.images.permute(0, 2, 3, 1).numpy():
        out = io.BytesIO()
        Image.fromarray(pixels if images.channels == 3 else pixels[..., 0]).save(out, form, quality=quality)
        files.append(out.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    return Packed(np.frombuffer(b"".join(files), dtype=np.uint8), offsets)


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name, p, q in zip(Batch._fields, a, b, strict=True):
            assert p.dtype == q.dtype
            assert torch.equal(p, q), name
        assert b.x.is_contiguous(memory_format=torch.channels_last)
        assert b.x.dtype == torch.float32


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_resident_batches_are_what_the_order_says() -> None:
    images = some_images()
    batches = list(ResidentLoader(images, CONFIG, seed=3, augment=False).epoch(2))
    index = torch.cat([batch.index for batch in batches])
    assert torch.equal(index, epoch_order(45, 3, 2))
    assert torch.equal(torch.cat([batch.y for batch in batches]), images.labels[index])
    assert torch.equal(torch.cat([batch.x for batch in batches]), images.images[index].float() / 255)


@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
def test_every_resident_image_is_a_crop_of_its_own(pad_mode: str) -> None:
    images, config = some_images(), replace(CONFIG, pad_mode=pad_mode)  # type: ignore[arg-type]
    mode = "constant" if pad_mode == "zero" else "reflect"
    padded = torch.nn.functional.pad(images.images.float() / 255, (2, 2, 2, 2), mode=mode)
    seen = set()
    for x, _, index in ResidentLoader(images, config, seed=0).epoch(0):
        for image, i in zip(x, index.tolist(), strict=True):
            crops = {
                (r, c, f): crop.flip(-1) if f else crop
                for r in range(5)
                for c in range(5)
                for f in (0, 1)
                for crop in [padded[i, :, r : r + 9, c : c + 7]]
            }
            found = [place for place, crop in crops.items() if torch.equal(crop, image)]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) > 20


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    images = some_images()

    def by_index(seed: int, epoch: int, **change: object) -> dict[int, bytes]:
        config = replace(CONFIG, **change)  # type: ignore[arg-type]
        batches = ResidentLoader(images, config, seed=seed, train_index=TRAIN).epoch(epoch)
        return {
            int(i): x.numpy().tobytes() for batch in batches for x, i in zip(batch.x, batch.index, strict=True)
        }

    TRAIN = torch.arange(3, 43)
    base = by_index(1, 5)
    assert sorted(base) == list(range(3, 43))
    assert by_index(1, 5, batch_size=7) == base
    assert by_index(1, 6) != base
    assert by_index(2, 5) != base


@needs_dali
@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
@pytest.mark.parametrize(
    ("channels", "pad", "flip"), [(3, 2, True), (1, 3, True), (3, 0, True), (3, 4, False), (1, 0, False)]
)
def test_dali_equals_resident(pad_mode: str, channels: int, pad: int, flip: bool) -> None:
    images = some_images(channels=channels)
    config = replace(CONFIG, pad_mode=pad_mode, pad=pad, flip=flip)  # type: ignore[arg-type]
    resident, dali = (kind(images, config, seed=6) for kind in (ResidentLoader, DaliLoader))
    assert len(resident) == len(dali) == 6
    for epoch in (0, 1, 9):
        assert_same(list(resident.epoch(epoch)), list(dali.epoch(epoch)))
    plain = [kind(images, config, seed=6, augment=False) for kind in (ResidentLoader, DaliLoader)]
    assert_same(list(plain[0].epoch(3)), list(plain[1].epoch(3)))
    dali.close()
    plain[1].close()


@needs_dali
@pytest.mark.parametrize("channels", [1, 3])
def test_dali_decodes_lossless_files_to_the_same_pixels(channels: int) -> None:
    images = some_images(channels=channels)
    dali = DaliLoader(images, CONFIG, seed=6, encoded=packed(images))
    assert_same(list(ResidentLoader(images, CONFIG, seed=6).epoch(4)), list(dali.epoch(4)))
    dali.close()


@needs_dali
@pytest.mark.parametrize("count", [1, 2, 5])
def test_dali_does_not_depend_on_its_threads(count: int) -> None:
    images = some_images()
    dali = DaliLoader(images, replace(CONFIG, threads=count), seed=6)
    assert_same(list(ResidentLoader(images, CONFIG, seed=6).epoch(1)), list(dali.epoch(1)))
    dali.close()


@pytest.mark.parametrize("kind", [ResidentLoader, pytest.param(DaliLoader, marks=needs_dali)])
@pytest.mark.parametrize("last_batch", ["drop", "keep"])
def test_resume_in_the_middle_of_an_epoch(kind: type[ResidentLoader], last_batch: str) -> None:
    images, config = some_images(), replace(CONFIG, last_batch=last_batch)  # type: ignore[arg-type]
    loader = kind(images, config, seed=2)
    whole = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    assert len(whole[0]) == len(loader) == (5 if last_batch == "drop" else 6)
    for start in range(len(loader) + 1):
        fresh = kind(images, config, seed=2)
        assert_same(whole[1][start:], list(fresh.epoch(1, start)))
        assert_same(whole[0], list(fresh.epoch(0)))
        fresh.close()
    with pytest.raises(ValueError, match="start is 7"):
        list(loader.epoch(0, 7))
    loader.close()


@pytest.mark.parametrize("kind", [ResidentLoader, pytest.param(DaliLoader, marks=needs_dali)])
def test_too_much_to_reflect_is_refused_at_once(kind: type[ResidentLoader]) -> None:
    config = replace(CONFIG, pad=7, pad_mode="reflect")
    with pytest.raises(DataError, match="pad is 7, too much to reflect 9x7 images"):
        kind(some_images(), config, seed=2)
    kind(some_images(), config, seed=2, augment=False).close()


@needs_dali
def test_an_epoch_given_up_leaves_nothing_behind() -> None:
    images = some_images()
    loader, resident = DaliLoader(images, CONFIG, seed=2), ResidentLoader(images, CONFIG, seed=2)
    for taken in (0, 1, 4, 6):
        old = loader.epoch(3)
        assert len(list(islice(old, taken))) == taken
        assert_same(list(resident.epoch(4)), list(loader.epoch(4)))
        if 0 < taken < 6:
            with pytest.raises(ValueError, match="another epoch was begun"):
                next(old)
    loader.close()


@needs_dali
def test_close_stops_the_threads() -> None:
    images = some_images()
    before = threads()
    for taken in (0, 2, 6):
        loader = DaliLoader(images, replace(CONFIG, threads=3), seed=2)
        assert threads() > before
        batches = list(islice(loader.epoch(0), taken))
        loader.close()
        loader.close()
        assert threads() == before
        for batch in batches:
            assert torch.equal(batch.y, images.labels[batch.index])  # batches outlive the loader
        with pytest.raises(ValueError, match="closed"):
            list(loader.epoch(1))


@needs_dali
def test_what_dali_cannot_decode_is_an_error_in_one_line() -> None:
    images = some_images()
    files = packed(images)
    broken = Packed(np.zeros_like(files.data), files.offsets)
    loader = DaliLoader(images, CONFIG, seed=2, encoded=broken)
    with pytest.raises(DataError, match=r"some\.file: DALI") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="closed"):
        list(loader.epoch(1))
    with pytest.raises(DataError, match="44 image files for 45 images"):
        DaliLoader(images, CONFIG, seed=2, encoded=Packed(files.data, files.offsets[:-1]))


def test_without_dali_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"is not installed: pip install 'mwpb-fast\[dali\]'"):
        make_loader(some_images(), Config(name="digits", loader="dali", batch_size=8), seed=0)
    assert isinstance(make_loader(some_images(), replace(CONFIG, loader="auto"), seed=0), ResidentLoader)


@needs_dali
def test_make_loader_follows_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    images = some_images()
    config = Config(name="digits", batch_size=8)
    for loader, kind in (("auto", ResidentLoader), ("resident", ResidentLoader), ("dali", DaliLoader)):
        made = make_loader(images, replace(config, loader=loader), seed=0)  # type: ignore[arg-type]
        assert type(made) is kind
        made.close()
    monkeypatch.setattr("mwpb_fast.data.memory_budget", lambda device: images.images.nbytes - 1)
    made = make_loader(images, config, seed=0)
    assert type(made) is DaliLoader
    made.close()


def test_eval_batches_go_in_order() -> None:
    images = some_images()
    batches = list(eval_batches(images, batch_size=20))
    assert [len(batch.y) for batch in batches] == [20, 20, 5]
    assert torch.equal(torch.cat([batch.x for batch in batches]), images.images.float() / 255)
    assert torch.equal(torch.cat([batch.y for batch in batches]), images.labels)
    chosen = torch.tensor([4, 44, 0])
    (batch,) = eval_batches(images, index=chosen)
    assert torch.equal(batch.index, chosen)
    assert torch.equal(batch.x, images.images[chosen].float() / 255)
    assert batch.x.is_contiguous(memory_format=torch.channels_last)


@needs_dali
def test_dali_decodes_the_real_tinyimagenet(shared_data: Path, tmp_path: Path) -> None:
    prepare("tinyimagenet", source=shared_data / "tinyimagenet-20.tar.xz", dir=tmp_path, encoded=True)
    config = Config(name="tinyimagenet", dir=str(tmp_path), subset=600, batch_size=64, pad_mode="reflect")
    images = load_split(config, "train")
    train, _ = split_indices(images.labels, config)
    encoded = load_encoded(config)
    assert encoded is not None
    resident = ResidentLoader(images, config, seed=1, train_index=train)
    dali = DaliLoader(images, config, seed=1, train_index=train, encoded=encoded)
    made = make_loader(images, replace(config, loader="dali"), seed=1, train_index=train)
    assert_same(list(dali.epoch(1)), list(made.epoch(1)))  # it finds the files too
    made.close()
    for a, b in zip(resident.epoch(0), dali.epoch(0), strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.y, b.y)
        difference = (a.x - b.x).abs() * 255
        assert difference.mean() < 0.5  # grey levels: two JPEG decoders, Pillow's and DALI's
        assert difference.max() < 8
    dali.close()
