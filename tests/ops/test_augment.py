"""crop_flip against numpy's padding, slicing and division, and its random numbers against a Philox of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import CPU, RUNNERS, TRITON_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from mwpb_kernels import OPS, crop_flip, crop_flip_params, force_reference

OP = OPS["crop_flip"]
SEED = torch.tensor([0x0123456789ABCDEF])
EVERY = pytest.mark.parametrize("runner", RUNNERS)


def philox(index: int, seed: int, stream: int) -> list[int]:
    """Philox 4x32-10 in plain Python integers, group 0."""
    counter = [0, index & 0xFFFFFFFF, index >> 32 & 0xFFFFFFFF, stream]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def numpy_batch(
    images: torch.Tensor, index: torch.Tensor, params: torch.Tensor, pad: int, mode: str
) -> np.ndarray:
    """Pad, cut and mirror each image of the batch by numpy; (B, C, H, W) float32."""
    height, width = images.shape[2:]
    out = []
    for image, (top, left, flipped) in zip(images.numpy()[index.numpy()], params.tolist(), strict=True):
        spread = ((0, 0), (pad, pad), (pad, pad))
        padded = np.pad(image, spread, mode="constant" if mode == "zero" else "reflect")
        cut = padded[:, top : top + height, left : left + width]
        out.append(cut[:, :, ::-1] if flipped else cut)
    return np.stack(out).astype(np.float32) / np.float32(255)


def images_of(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


def run(
    runner: str,
    images: torch.Tensor,
    index: torch.Tensor,
    pad: int,
    mode: str,
    flip: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    device = TRITON_DEVICE if runner == "triton" else CPU
    there = (t.to(device) for t in (images, index, SEED))
    return RUNNERS[runner](OP, (*there, pad, mode == "reflect", flip, dtype)).to(CPU)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_is_divided_with_correct_rounding(runner: str, dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    batch = run(runner, images, torch.tensor([0]), 0, "zero", False, dtype)
    exact = torch.from_numpy((np.arange(256) / 255.0).astype(np.float32)).view(1, 1, 16, 16)
    assert torch.equal(batch, exact.to(dtype))
    assert batch.min() == 0
    assert batch.max() == 1


@EVERY
@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize(
    ("channels", "height", "width", "pad"), [(3, 9, 7, 4), (1, 8, 8, 1), (4, 5, 6, 3), (5, 4, 11, 3)]
)
def test_against_numpy(runner: str, mode: str, channels: int, height: int, width: int, pad: int) -> None:
    images = images_of(6, channels, height, width)
    index = torch.tensor([5, 0, 0, 3, 1, 2, 4, 5])
    batch = run(runner, images, index, pad, mode, True, torch.float32)
    params = crop_flip_params(index, SEED, pad=pad)
    np.testing.assert_array_equal(batch.numpy(), numpy_batch(images, index, params, pad, mode))
    assert batch.is_contiguous(memory_format=torch.channels_last)


@EVERY
def test_zero_padding_wider_than_the_image(runner: str) -> None:
    images = images_of(40, 2, 3, 5)
    index = torch.arange(40)
    batch = run(runner, images, index, 11, "zero", True, torch.float32)
    params = crop_flip_params(index, SEED, pad=11)
    np.testing.assert_array_equal(batch.numpy(), numpy_batch(images, index, params, 11, "zero"))
    assert (batch.flatten(1).amax(1) == 0).any(), "some crop must lie outside the image altogether"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_layout_against_numpy(data: st.DataObject) -> None:
    count, channels, height, width = (data.draw(st.integers(1, n)) for n in (4, 5, 9, 9))
    mode = data.draw(st.sampled_from(["zero", "reflect"]))
    pad = data.draw(st.integers(0, min(height, width) - 1 if mode == "reflect" else 12))
    order = data.draw(st.permutations(range(4)))
    back = np.argsort(order).tolist()
    images = images_of(count, channels, height, width).permute(order).contiguous().permute(back)
    index = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=5)), dtype=torch.int64)
    seed = torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1))])
    batch = crop_flip(images, index, seed, pad=pad, pad_mode=mode)  # type: ignore[arg-type]
    assert batch.shape == (len(index), channels, height, width)
    if len(index):
        params = crop_flip_params(index, seed, pad=pad)
        np.testing.assert_array_equal(batch.numpy(), numpy_batch(images, index, params, pad, mode))


def test_a_large_image_is_cut_across_threads() -> None:
    images, index = images_of(2, 3, 301, 257), torch.tensor([1])
    batch = crop_flip(images, index, SEED, pad=40, pad_mode="reflect")
    params = crop_flip_params(index, SEED, pad=40)
    np.testing.assert_array_equal(batch.numpy(), numpy_batch(images, index, params, 40, "reflect"))


# random numbers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pad", [0, 1, 4, 255])
def test_params_are_philox_words(pad: int) -> None:
    indices = [0, 1, 77, 2**32 - 1, 2**32, 2**40 + 3, 2**62]
    for seed in (0, 1, 0x0123456789ABCDEF, 2**63 - 1):
        params = crop_flip_params(torch.tensor(indices), torch.tensor([seed]), pad=pad)
        expected = []
        for index in indices:
            words = philox(index, seed, stream=1)
            expected.append([words[0] * (2 * pad + 1) >> 32, words[1] * (2 * pad + 1) >> 32, words[2] >> 31])
        assert params.tolist() == expected
        assert params.dtype == torch.int32


def test_params_are_uniform() -> None:
    n = 90_000
    params = crop_flip_params(torch.arange(n), SEED, pad=4).double()
    for column in (0, 1):
        counts = torch.bincount(params[:, column].long(), minlength=9)
        assert len(counts) == 9
        # chi-squared with 8 degrees of freedom: 40 is passed once in 300,000
        assert (((counts - n / 9) ** 2) / (n / 9)).sum() < 40
    assert abs(params[:, 2].mean() - 0.5) < 5 * 0.5 / n**0.5
    correlation = torch.corrcoef(params.T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / n**0.5


def test_a_sample_is_cut_alike_in_any_batch_and_otherwise_under_another_seed() -> None:
    images = images_of(50, 3, 8, 8)
    order = torch.randperm(50)
    whole = crop_flip(images, torch.arange(50), SEED)
    assert torch.equal(crop_flip(images, order, SEED), whole[order])
    assert torch.equal(crop_flip(images, torch.tensor([7, 7]), SEED), whole[[7, 7]])
    other = crop_flip_params(torch.arange(50), SEED + 1)
    assert (other != crop_flip_params(torch.arange(50), SEED)).any(1).sum() > 40


def test_no_flip_leaves_the_offsets_as_they_are() -> None:
    index = torch.arange(20)
    with_flip, without = crop_flip_params(index, SEED), crop_flip_params(index, SEED, flip=False)
    assert torch.equal(with_flip[:, :2], without[:, :2])
    assert without[:, 2].sum() == 0
    images = images_of(20, 3, 8, 8)
    batch = crop_flip(images, index, SEED, flip=False)
    np.testing.assert_array_equal(batch.numpy(), numpy_batch(images, index, without, 4, "zero"))


# errors and compilation --------------------------------------------------------------------------------------
IMAGES, INDEX = images_of(4, 3, 8, 8), torch.tensor([0, 3])
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: crop_flip(IMAGES[0], INDEX, SEED),
        ValueError,
        r"images must be \(N, C, H, W\), not \(3, 8, 8\)",
    ),
    (lambda: crop_flip(IMAGES[:, :0], INDEX, SEED), ValueError, "images must be"),
    (lambda: crop_flip(IMAGES.float(), INDEX, SEED), TypeError, "images must be uint8, not torch.float32"),
    (lambda: crop_flip(IMAGES, INDEX[None], SEED), ValueError, r"index must be \(B,\) int64"),
    (lambda: crop_flip(IMAGES, INDEX.int(), SEED), ValueError, r"index must be .* not \(2,\) torch.int32"),
    (lambda: crop_flip(IMAGES, INDEX, SEED.repeat(2)), ValueError, "seed must be an int64 tensor with"),
    (lambda: crop_flip(IMAGES, INDEX, SEED.double()), ValueError, "seed must be an int64 tensor"),
    (lambda: crop_flip(IMAGES, INDEX, SEED, pad=-1), ValueError, "pad must be between 0 and 255, not -1"),
    (lambda: crop_flip(IMAGES, INDEX, SEED, pad=256), ValueError, "pad must be between 0 and 255, not 256"),
    (lambda: crop_flip(IMAGES, INDEX, SEED, pad=8, pad_mode="reflect"), ValueError, "reflection needs pad"),
    (lambda: crop_flip(IMAGES, INDEX, SEED, pad_mode="edge"), ValueError, "pad_mode must be"),  # type: ignore[arg-type]
    (
        lambda: crop_flip(IMAGES, INDEX, SEED, dtype=torch.float64),
        TypeError,
        "dtype must be float32, bfloat16",
    ),
    (lambda: crop_flip(IMAGES, INDEX.to("meta"), SEED), ValueError, "different devices"),
    (lambda: crop_flip_params(INDEX.int(), SEED), ValueError, "index must be"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refused(case: int) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("wrong", [-1, 4, -(2**62)])
def test_unknown_index_raises_on_the_cpu(wrong: int) -> None:
    index = torch.tensor([1, wrong, 2])
    for reference in (False, True):
        with force_reference(reference), pytest.raises(RuntimeError) as raised:
            crop_flip(IMAGES, index, SEED)
        assert str(raised.value).splitlines()[0] == f"index {wrong} is outside the data set's 4 images"
    with pytest.raises(RuntimeError, match="outside the data set's 0 images"):
        crop_flip(IMAGES[:0], index, SEED)


@pytest.mark.skipif("triton" not in RUNNERS, reason="needs Triton")
def test_unknown_index_gives_nan_where_looking_would_stall() -> None:
    batch = run("triton", IMAGES, torch.tensor([1, -1, 4, 2]), 4, "zero", True, torch.bfloat16)
    assert batch.isnan().flatten(1).all(1).tolist() == [False, True, True, False]
    assert not batch[[0, 3]].isnan().any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_a_whole(dynamic: bool) -> None:
    torch.compiler.reset()

    def batch(index: torch.Tensor) -> torch.Tensor:
        return crop_flip(IMAGES, index, SEED, pad_mode="reflect", dtype=torch.bfloat16) * 2

    compiled = torch.compile(batch, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for index in (INDEX, torch.tensor([1, 1, 2])):
        assert torch.equal(compiled(index), batch(index))
    torch.compiler.reset()
