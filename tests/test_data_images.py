"""Image files: what is refused and what is said, how mixed sizes become one, and that both decoders agree."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_data_sets import folder_files, picture, svhn_files, write

from mwpb_fast import cli
from mwpb_fast.data import Config, DataError, load_encoded, load_split, prepare
from mwpb_fast.data.fit import Fit, make_fit

SIDE = (6, 5)  # width, height
PIXELS = np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8)
SMOOTH = (np.arange(5)[:, None, None] * 20 + np.arange(6)[:, None] * 9 + np.array([0, 40, 80])).astype(np.uint8)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png16(channels: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write in colour."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + bytes(range(6 * channels * 2)) for _ in range(5))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", *SIDE, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


RGB = Image.fromarray(PIXELS)
ALPHA = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0] | 1]))
OPAQUE = Image.fromarray(np.dstack([PIXELS, np.full((5, 6), 255, np.uint8)]))
PALETTE = RGB.quantize(16)
SAME = {  # no line is said of these
    "palette.png": saved(PALETTE),
    "gray.png": saved(RGB.convert("L")),
    "bit.png": saved(RGB.convert("1")),
    "opaque.png": saved(OPAQUE),
    "upright.jpg": saved(Image.fromarray(SMOOTH), "JPEG", exif=orientation(1)),
    "lossless.webp": saved(RGB, "WEBP", lossless=True),
    "plain.bmp": saved(RGB, "BMP"),
    "plain.ppm": saved(RGB, "PPM"),
    "plain.pgm": saved(RGB.convert("L"), "PPM"),
}
SAID = {
    "alpha.png": (saved(ALPHA), "have transparency, which is dropped"),
    "alpha.webp": (saved(ALPHA, "WEBP", lossless=True, exact=True), "have transparency, which is dropped"),
    "gray_alpha.png": (saved(ALPHA.convert("LA")), "have transparency, which is dropped"),
    "hole.png": (
        saved(PALETTE, transparency=int(np.asarray(PALETTE)[0, 0])),
        "have transparency, which is dropped",
    ),
    "print.jpg": (
        saved(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
        "are CMYK, converted to RGB without a colour profile",
    ),
    "moving.png": (
        saved(RGB, save_all=True, append_images=[Image.fromarray(255 - PIXELS)]),
        "are animated, of which the first frame is taken",
    ),
    "turned.jpg": (
        saved(Image.fromarray(SMOOTH), "JPEG", exif=orientation(6)),
        "have an EXIF orientation, which is not applied",
    ),
    "turned.png": (saved(RGB, exif=orientation(3)), "have an EXIF orientation, which is not applied"),
}


def prepared(tmp_path: Path, change: dict[str, bytes], **options: Any) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    source = write(tmp_path / "x", {**folder_files(), **change})
    return prepare("folder", source=source, dir=tmp_path / "data", tell=told.append, **options), told


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_a_channel_are_refused(channels: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ant/deep\.png: pixel format .*, only 8 bits a channel"):
        prepared(tmp_path, {"top/train/ant/deep.png": png16(channels)})


@pytest.mark.parametrize("kind", ["P6", "P5", "P3"])
def test_portable_maps_of_more_than_8_bits_are_refused(kind: str, tmp_path: Path) -> None:
    samples = 30 if kind == "P5" else 90
    body = b"7 " * samples if kind == "P3" else bytes(2 * samples)
    content = f"{kind} 6 5 65535\n".encode() + body
    with pytest.raises(DataError, match=r"deep\.ppm: pixel format .*, only 8 bits a channel"):
        prepared(tmp_path, {"top/train/ant/deep.ppm": content})


def test_what_pixels_do_not_show_is_said(tmp_path: Path) -> None:
    change = {f"top/train/ant/{name}": content for name, content in SAME.items()}
    change |= {f"top/train/bee/{name}": content for name, (content, _) in SAID.items()}
    meta, told = prepared(tmp_path, change)
    of = f"{9 + len(change)} images"
    first = f"(the first: {tmp_path}/x/top/train/bee"
    assert sorted(told) == [
        f"1 of {of} are CMYK, converted to RGB without a colour profile {first}/print.jpg)",
        f"1 of {of} are animated, of which the first frame is taken {first}/moving.png)",
        f"2 of {of} have an EXIF orientation, which is not applied {first}/turned.jpg)",
        f"4 of {of} have transparency, which is dropped {first}/alpha.png)",
    ]
    assert meta["notes"] == told


def test_every_line_is_of_its_own_file(tmp_path: Path) -> None:
    for number, (name, (content, line)) in enumerate(SAID.items()):
        _, told = prepared(tmp_path / str(number), {f"top/train/bee/{name}": content})
        assert len(told) == 1
        assert line in told[0]


def test_both_decoders_make_the_same_of_every_kind_of_file(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="needs the extra dali")
    from mwpb_fast.data.dali import DaliLoader
    from mwpb_fast.data.resident import ResidentLoader

    change = {f"top/train/ant/{name}": content for name, content in SAME.items()}
    change |= {f"top/train/bee/{name}": content for name, (content, _) in SAID.items()}
    prepared(tmp_path, change, encoded=True)
    config = Config(
        name="folder", dir=str(tmp_path / "data"), batch_size=4, pad=1, last_batch="keep", validation=0, threads=1
    )
    images = load_split(config, "train")
    dali = DaliLoader(images, config, seed=1, encoded=load_encoded(config))
    resident = ResidentLoader(images, config, seed=1)
    for theirs, ours in zip(dali.epoch(1), resident.epoch(1), strict=True):
        assert theirs.index.tolist() == ours.index.tolist()
        # two decoders may round a JPEG apart; turned or not is another matter
        assert (theirs.x - ours.x).abs().max() <= 3 / 255
    dali.close()


def test_a_page_in_place_of_an_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ant/0\.png: not an image but an HTML page"):
        prepared(tmp_path, {"top/train/ant/0.png": b"<html><body>404</body></html>"})


def test_an_image_too_large_to_be_meant_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"not an image that can be read .*decompression bomb"):
        prepared(tmp_path, {})


# sizes ----------------------------------------------------------------------------------------------------------
WIDE = {"top/train/ant/wide.png": picture(1, size=(12, 7)), "top/test/cat/high.png": picture(2, size=(5, 20))}


@pytest.mark.parametrize(
    ("resize", "crop", "size"),
    [("4x3", None, (4, 3)), ("5", "5", (5, 5)), ("8x8", "6x4", (6, 4)), (None, "4x2", (4, 2))],
)
def test_mixed_sizes_become_one(
    resize: str | None, crop: str | None, size: tuple[int, int], tmp_path: Path
) -> None:
    fit = make_fit(resize, crop)
    meta, told = prepared(tmp_path, WIDE, fit=fit)
    assert (meta["width"], meta["height"]) == size
    assert not told
    saved_meta = json.loads((tmp_path / "data" / "folder" / "meta.json").read_text())
    assert saved_meta["fit"]["crop"] == list(fit.crop or ())
    assert saved_meta["fit"]["resize"] == list(fit.resize)
    assert ("BICUBIC" in saved_meta["fit"].get("filter", "")) == bool(resize)
    images = load_split(Config(name="folder", dir=str(tmp_path / "data")), "train").images
    wide = Image.open(io.BytesIO(WIDE["top/train/ant/wide.png"]))
    if resize:
        scaled = {"4x3": (4, 3), "5": (round(12 * 5 / 7), 5), "8x8": (8, 8)}[resize]
        wide = wide.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (wide.width - size[0]) // 2, (wide.height - size[1]) // 2
    expected = np.asarray(wide)[top : top + size[1], left : left + size[0]]
    assert np.array_equal(images[3].permute(1, 2, 0).numpy(), expected)  # after 0.png, 1.png and 2.png of ant


def test_mixed_sizes_without_an_option_tell_the_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wide\.png: is 12x7, .* are 6x5; --resize, --crop or both"):
        prepared(tmp_path, WIDE)
    with pytest.raises(DataError, match=r"wide\.png: is 9x5, .* are 6x5; --crop too"):
        prepared(tmp_path, WIDE, fit=make_fit("5", None))
    with pytest.raises(DataError, match=r"0\.png: is 6x5, too small for a crop of 7x7; --resize 7 first"):
        prepared(tmp_path, WIDE, fit=make_fit(None, "7"))


def test_a_fit_is_for_image_files_that_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--encoded keeps image files as they are"):
        prepared(tmp_path, WIDE, fit=Fit((4, 4)), encoded=True)
    with pytest.raises(DataError, match="holds arrays, not image files"):
        prepare("svhn", source=write(tmp_path / "s", svhn_files()), dir=tmp_path, fit=Fit((4, 4)))


@pytest.mark.parametrize("text", ["", "0", "x", "64x", "-3", "4x5x6", "99999", "6.5"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"--resize: .* is no size"):
        make_fit(text, None)


def test_sizes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "x", {**folder_files(), **WIDE})
    words = ["data", "prepare", "folder:small", "--from", str(source), "--dir", str(tmp_path), "--resize", "5"]
    assert cli.main([*words, "--crop", "5"]) == 0
    assert "10 train and 10 test images of 3 classes" in capsys.readouterr().out
    assert load_split(Config(name="folder:small", dir=str(tmp_path)), "test").images.shape == (10, 3, 5, 5)
    assert cli.main([*words, "--crop", "huge", "--replace"]) == 2
    assert "--crop: huge is no size" in capsys.readouterr().err
