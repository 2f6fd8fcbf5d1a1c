"""The step from a uint8 data set to a batch of images: gather, pad, crop, flip and scale in one pass.

Where each crop lies and whether it is flipped is a counter-based function of the seed and the sample's index,
so every loader, device and implementation cuts the same batch. `crop_flip_params` gives the same numbers to
code that does the cutting itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from mwpb_kernels.crop import check_crop, crop_params, reflected, source_positions
from mwpb_kernels.op import Compile, Op, check_device, check_tensors, tl, triton
from mwpb_kernels.philox import STREAM_CROP, philox_block

BATCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# reference ---------------------------------------------------------------------------------------------------
def crop_flip_reference(
    images: Tensor, index: Tensor, seed: Tensor, pad: int, reflect: bool, flip: bool, dtype: torch.dtype
) -> Tensor:
    count, _, height, width = images.shape
    known = (index >= 0) & (index < count)
    if images.device.type == "cpu" and not bool(known.all()):
        raise RuntimeError(f"index {int(index[~known][0])} is outside the data set's {count} images")
    params = crop_params(index, seed, pad, flip)
    rows = source_positions(params[:, 0], height, pad)
    columns = source_positions(params[:, 1], width, pad)
    columns = torch.where(params[:, 2:] == 1, columns.flip(1), columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    if reflect:
        rows, columns = reflected(rows, height), reflected(columns, width)
    if count == 0:  # There is no image to look up, and so no batch either but for unknown indices on a GPU.
        unknown = images.new_full((len(index), height, width, images.shape[1]), torch.nan, dtype=dtype)
        return unknown.permute(0, 3, 1, 2)
    picked = images[
        index.clamp(0, count - 1)[:, None, None],
        :,
        rows.clamp(0, height - 1)[:, :, None],
        columns.clamp(0, width - 1)[:, None, :],
    ]  # (B, H, W, C)
    # The divisor is a tensor on the device: by a number, CUDA would multiply with its rounded reciprocal.
    scaled = picked.to(torch.float32) / torch.full((), 255.0, device=images.device)
    if not reflect:
        scaled = torch.where(inside[..., None], scaled, 0.0)
    scaled = torch.where(known[:, None, None, None], scaled, torch.nan)
    return scaled.to(dtype).contiguous().permute(0, 3, 1, 2)


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _mirror(position, size):
    """Positions up to size - 1 beyond either edge, mirrored about the edge pixel; always within the image."""
    return tl.maximum((size - 1) - tl.abs((size - 1) - tl.abs(position)), 0)


@triton.jit
def _crop_flip_kernel(
    out_ptr,  # (B, H, W, C) contiguous
    images_ptr,  # (N, C, H, W) uint8
    index_ptr,  # (B,) int64
    seed_ptr,  # (1,) int64
    count, height, width, pad,
    stride_n, stride_c, stride_h, stride_w, index_stride,
    STREAM: tl.constexpr, REFLECT: tl.constexpr, FLIP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    numel = height * width * CHANNELS
    pieces = tl.cdiv(numel, BLOCK)
    sample = (tl.program_id(0) // pieces).to(tl.int64)
    element = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    image = tl.load(index_ptr + sample * index_stride)
    known = (image >= 0) & (image < count)
    zero = tl.zeros((1,), tl.int64)
    word0, word1, word2, _ = philox_block(tl.load(seed_ptr), zero + STREAM, zero + image, zero)
    span = (zero + 2 * pad + 1).to(tl.uint32)
    channel = element % CHANNELS
    column = (element // CHANNELS) % width
    row = element // CHANNELS // width + tl.umulhi(word0, span).to(tl.int32) - pad
    if FLIP:
        column = tl.where((word2 >> 31) == 1, width - 1 - column, column)
    column += tl.umulhi(word1, span).to(tl.int32) - pad
    inside = element < numel
    if REFLECT:
        row = _mirror(row, height)
        column = _mirror(column, width)
    else:
        inside &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w + channel.to(tl.int64) * stride_c
    pixel = tl.load(images_ptr + image * stride_n + source, mask=inside & known, other=0)
    value = tl.div_rn(pixel.to(tl.float32), 255.0)
    if out_ptr.dtype.element_ty == tl.bfloat16:
        # The value is rounded here, to nearest even, because Triton's interpreter would truncate it.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    value = tl.where(known, value, float("nan"))
    tl.store(out_ptr + sample * numel + element, value.to(out_ptr.dtype.element_ty), mask=element < numel)


# launcher ----------------------------------------------------------------------------------------------------
# It divides a 32x32 and a 64x64 image of three channels, so that no program is partly idle there.
CROP_BLOCK = 1024


def crop_flip_triton(
    images: Tensor, index: Tensor, seed: Tensor, pad: int, reflect: bool, flip: bool, dtype: torch.dtype
) -> Tensor:
    count, channels, height, width = images.shape
    out = images.new_empty((len(index), height, width, channels), dtype=dtype)
    if out.numel():
        _crop_flip_kernel[(len(index) * triton.cdiv(height * width * channels, CROP_BLOCK),)](
            out_ptr=out,
            images_ptr=images,
            index_ptr=index,
            seed_ptr=seed,
            count=count,
            height=height,
            width=width,
            pad=pad,
            stride_n=images.stride(0),
            stride_c=images.stride(1),
            stride_h=images.stride(2),
            stride_w=images.stride(3),
            index_stride=index.stride(0),
            STREAM=STREAM_CROP,
            REFLECT=reflect,
            FLIP=flip,
            CHANNELS=channels,
            BLOCK=CROP_BLOCK,
        )
    return out.permute(0, 3, 1, 2)


# registration ------------------------------------------------------------------------------------------------
def crop_flip_fake(
    images: Tensor, index: Tensor, seed: Tensor, pad: int, reflect: bool, flip: bool, dtype: torch.dtype
) -> Tensor:
    """(B, C, H, W), channels-last."""
    _, channels, height, width = images.shape
    return images.new_empty((index.shape[0], height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def crop_flip_samples(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Empty batch, one pixel, the digits' and CIFAR's shapes, odd sizes, pads beyond the image, all types."""
    generator = torch.Generator().manual_seed(0)
    for count, batch, channels, height, width, pad, reflect, flip, dtype in (
        (3, 0, 3, 8, 8, 4, False, True, torch.float32),
        (1, 1, 1, 1, 1, 1, False, True, torch.float32),
        (9, 17, 1, 8, 8, 1, True, True, torch.float32),
        (40, 128, 3, 32, 32, 4, False, True, torch.float32),
        (7, 5, 3, 13, 9, 8, True, True, torch.bfloat16),
        (7, 6, 4, 5, 35, 20, False, True, torch.float16),
        (5, 5, 2, 6, 7, 0, False, False, torch.float32),
    ):
        images = torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
        index = torch.randint(count, (batch,), generator=generator)
        seed = torch.tensor([0x1234567890ABCDE])
        images = images.contiguous(memory_format=torch.channels_last)
        yield images.to(device), index.to(device), seed.to(device), pad, reflect, flip, dtype


def crop_flip_bytes(images: Tensor, index: Tensor, *options: Any) -> int:
    """Each image of the batch read once and written once, in the type that comes last."""
    return index.numel() * (8 + images[:1].numel() * (1 + options[-1].itemsize))


CROP_FLIP = Op(
    schema="crop_flip(Tensor images, Tensor index, Tensor seed, int pad, bool reflect, bool flip, "
    "ScalarType dtype) -> Tensor",
    reference=crop_flip_reference,
    fake=crop_flip_fake,
    triton=crop_flip_triton,
    samples=crop_flip_samples,
    bytes_moved=crop_flip_bytes,
    compiles=tuple(
        Compile(
            kernel=_crop_flip_kernel,
            signature={
                "out_ptr": f"*{dtype}",
                "images_ptr": "*u8",
                "index_ptr": "*i64",
                "seed_ptr": "*i64",
                **dict.fromkeys(("count", "height", "width", "pad"), "i32"),
                **dict.fromkeys(("stride_n", "stride_c", "stride_h", "stride_w", "index_stride"), "i32"),
            },
            constants={
                "STREAM": STREAM_CROP,
                "REFLECT": reflect,
                "FLIP": True,
                "CHANNELS": channels,
                "BLOCK": CROP_BLOCK,
            },
            max_registers=64,
        )
        for dtype, reflect, channels in (("fp32", False, 3), ("bf16", True, 3), ("fp16", False, 1))
    ),
)


# public functions --------------------------------------------------------------------------------------------
def crop_flip(
    images: Tensor,
    index: Tensor,
    seed: Tensor,
    *,
    pad: int = 4,
    pad_mode: Literal["zero", "reflect"] = "zero",
    flip: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A batch of randomly cropped and flipped images from a uint8 data set, in one pass.

    images: (N, C, H, W) uint8, any strides (channels-last is fastest). index: (B,) int64, which images, and
    the counter of their random numbers. seed: one-element int64 tensor on the same device, read there (no
    synchronisation); fold the epoch into it with `derive_seed`. pad: how many pixels, 0 to 255, are added on
    each side before a crop of the image's own size is cut; `pad_mode` fills them with zeros or with the
    reflected image (then pad < H and pad < W). flip: mirror left to right with probability 1/2. dtype: of the
    result: float32, bfloat16 or float16. With pad=0 and flip=False this is the plain gather and scale.

    Returns (B, C, H, W), channels-last, in [0, 1]: v / 255 correctly rounded to float32, then to `dtype`;
    equal to the bit on every implementation. The random numbers are those of `crop_flip_params`.

    Raises ValueError or TypeError for other shapes, types, pads or mixed devices. An index outside [0, N)
    raises RuntimeError on the CPU; on CUDA, where looking at it would stall the device, its image is NaN.
    """
    check_tensors(images=images)
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images must be (N, C, H, W), not {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    pad = check_crop(index, seed, pad)
    check_device(images, index, seed)
    if pad_mode not in ("zero", "reflect"):
        raise ValueError(f"pad_mode must be 'zero' or 'reflect', not {pad_mode!r}")
    if pad_mode == "reflect" and pad >= min(images.shape[2:]):
        raise ValueError(f"reflection needs pad < height and width, not pad={pad} for {tuple(images.shape[2:])}")
    if not isinstance(flip, bool):
        raise TypeError(f"flip must be True or False, not {flip!r}")
    if dtype not in BATCH_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    return CROP_FLIP(images, index, seed, pad, pad_mode == "reflect", flip, dtype)
