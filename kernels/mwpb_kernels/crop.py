"""Where each sample's crop lies and whether it is flipped, and the numbers of that for code that cuts itself."""

from __future__ import annotations

import torch
from torch import Tensor

from mwpb_kernels.op import check_device, check_tensors, whole
from mwpb_kernels.philox import STREAM_CROP, philox_words

MAX_PAD = 255


def crop_params(index: Tensor, seed: Tensor, pad: int, flip: bool) -> Tensor:
    """(B, 3) int32: row offset and column offset in the padded image, and whether to flip."""
    words = philox_words(index, seed, STREAM_CROP)[:, 0]
    offsets = (words[:, :2] * (2 * pad + 1)) >> 32
    flips = (words[:, 2:3] >> 31) * int(flip)
    return torch.cat((offsets, flips), dim=1).to(torch.int32)


def source_positions(offset: Tensor, size: int, pad: int) -> Tensor:
    """(B, size) int64: where each position of the crops lies along one side of the image before padding."""
    return torch.arange(size, device=offset.device) + (offset.long() - pad)[:, None]


def reflected(position: Tensor, size: int) -> Tensor:
    """Positions up to size - 1 beyond either edge, mirrored about the edge pixel."""
    return (size - 1) - ((size - 1) - position.abs()).abs()


def crop_flip_params(index: Tensor, seed: Tensor, *, pad: int = 4, flip: bool = True) -> Tensor:
    """The random numbers with which `crop_flip` cuts these samples, for code that does its own cutting.

    index: (B,) int64. seed: one-element int64 tensor on the same device. Returns (B, 3) int32: the crop's
    row offset in [0, 2 * pad] and column offset in [0, 2 * pad] within the padded image, and 1 where the crop
    is then flipped left to right, else 0. Philox words 0, 1 and 2 of stream STREAM_CROP: (word * (2 * pad + 1))
    >> 32 for the offsets, word >> 31 for the flip. Raises ValueError or TypeError for other shapes or types.
    """
    pad = check_crop(index, seed, pad)
    check_device(index, seed)
    return crop_params(index, seed, pad, flip)


def check_crop(index: Tensor, seed: Tensor, pad: int) -> int:
    """The pad as int; what no crop can be drawn from is refused."""
    pad = whole(pad, "pad")
    check_tensors(index=index, seed=seed)
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be (B,) int64, not {tuple(index.shape)} {index.dtype}")
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be an int64 tensor with one element, not {tuple(seed.shape)} {seed.dtype}")
    if not 0 <= pad <= MAX_PAD:
        raise ValueError(f"pad must be between 0 and {MAX_PAD}, not {pad}")
    return pad
