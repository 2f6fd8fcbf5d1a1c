"""Weights times their batch norm's factor of each channel, rounded, over all layers of a model at once.

weight = round(source * scale[channel]): a convolution or linear layer with the eval-mode batch norm that follows
it folded in (Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", CVPR 2018, section 3.2). Copy, product and rounding one after the other read and write each weight
three times.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mwpb_kernels.op import Compile, Op, check_device, tl, triton, writes_in_place
from mwpb_kernels.tensorlist import (
    BLOCK,
    LAUNCH_TYPES,
    as_list,
    check_written,
    flat_lists,
    launch_arguments,
    part_of,
    tensor_at,
    write_back,
)

MOST_IN_A_ROW = 2**30  # elements of a channel that the kernel counts in 32 bits


# reference ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def fold_reference(weights: list[Tensor], sources: list[Tensor], scales: list[Tensor]) -> None:
    if not weights:
        return
    made_there = any(weight.is_inference() for weight in weights)  # where alone PyTorch lets them be written
    with torch.inference_mode() if made_there else contextlib.nullcontext():
        factors = [
            scale.view(-1, *[1] * (source.dim() - 1)) for source, scale in zip(sources, scales, strict=True)
        ]
        torch._foreach_copy_(weights, torch._foreach_mul(sources, factors))


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _fold_kernel(
    table_ptr,  # (3, T) addresses of the weights, sources, scales
    layout_ptr,  # (T, 4) elements, blocks a part, first part, parts
    owner_ptr,  # (parts,) tensor of every part
    row_ptr,  # (T,) elements of a channel
    like_ptr,  # of the weights' type
    tensors,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _part, owner, numel, _first, _parts, start, blocks = part_of(layout_ptr, owner_ptr, ALIGNED, BLOCK)
    w_ptr = tl.load(table_ptr + owner).to(like_ptr.dtype)
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
    s_ptr = tensor_at(table_ptr, tensors + owner, ALIGNED)
    f_ptr = tensor_at(table_ptr, 2 * tensors + owner, ALIGNED)
    row = tl.load(row_ptr + owner)
    for block in range(blocks):
        begin = start + block * BLOCK
        at = begin + tl.arange(0, BLOCK)
        channel = begin // row  # in 64 bits once a block, in 32 for each element
        within = (begin - channel * row).to(tl.int32) + tl.arange(0, BLOCK)
        scale = tl.load(f_ptr + channel + within // row.to(tl.int32), mask=at < numel)
        product = tl.load(s_ptr + at, mask=at < numel) * scale
        tl.store(w_ptr + at, product.to(like_ptr.dtype.element_ty), mask=at < numel)


# launcher ----------------------------------------------------------------------------------------------------
@functools.cache
def rows_of(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device, kept for good as `layout_of` is."""
    return torch.tensor(rows, device=device)


@torch.no_grad()
def fold_triton(weights: list[Tensor], sources: list[Tensor], scales: list[Tensor]) -> None:
    rows = [w[0].numel() for w in weights if w.numel()]
    if any(row > MOST_IN_A_ROW for row in rows) or len({w.dtype for w in weights}) > 1:
        return fold_reference(weights, sources, scales)
    if not rows:
        return None
    folded, read = flat_lists(weights, sources)
    factors = [s.contiguous() for w, s in zip(weights, scales, strict=True) if w.numel()]
    grid, arguments = launch_arguments(folded, read, factors)
    _fold_kernel[grid](row_ptr=rows_of(tuple(rows), weights[0].device), like_ptr=folded[0], **arguments)
    write_back(weights, folded)
    return None


# registration ------------------------------------------------------------------------------------------------
def fold_samples(device: torch.device) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Empty, odd sizes, one channel, linear layers, float64, a small ResNet's worth; in each type."""
    generator = torch.Generator().manual_seed(0)
    resnet = [(64, 64, 3, 3), (128, 64, 3, 3), (128, 64, 1, 1), (16, 512)]
    for shapes, of, into in (
        ([(0, 3)], torch.float32, torch.bfloat16),
        ([(3,), (5, 7), (4, 3, 3, 3), (1, 3, 2, 5)], torch.float32, torch.bfloat16),
        ([(3, 5), (2, 3, 3, 3)], torch.float32, torch.float16),
        ([(3, 5), (2, 3, 3, 3)], torch.float32, torch.float32),
        ([(3, 5), (2, 3, 3, 3)], torch.float64, torch.float64),
        (resnet, torch.float32, torch.bfloat16),
    ):
        sources = [torch.randn(shape, generator=generator, dtype=of) for shape in shapes]
        for i, t in enumerate(sources):
            sources[i] = t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        scales = [torch.rand(shape[0], generator=generator, dtype=of) + 0.5 for shape in shapes]
        weights = [torch.full_like(s, torch.nan, dtype=into) for s in sources]
        yield [w.to(device) for w in weights], [s.to(device) for s in sources], [s.to(device) for s in scales]


FOLD = Op(
    schema="fold_(Tensor(a!)[] weights, Tensor[] sources, Tensor[] scales) -> ()",
    reference=fold_reference,
    fake=writes_in_place,
    triton=fold_triton,
    mutates=(0,),
    samples=fold_samples,
    bytes_moved=lambda *lists: sum(t.nbytes for tensors in lists for t in tensors),
    compiles=tuple(
        Compile(
            kernel=_fold_kernel,
            signature={**LAUNCH_TYPES, "row_ptr": "*i64", "like_ptr": f"*{into}"},
            constants={"ALIGNED": True, "BLOCK": BLOCK},
            max_registers=64,
        )
        for into in ("bf16", "fp16", "fp32")
    ),
    native=False,
)


# public function ---------------------------------------------------------------------------------------------
@torch.no_grad()
def fold_(weights: Iterable[Tensor], sources: Iterable[Tensor], scales: Iterable[Tensor]) -> None:
    """Write into every tensor of `weights` its source times the factor of each channel, rounded to its type.

    sources: (channels, ...) float32 or float64. weights: one for each, same shape, of one type: float32, bfloat16,
    float16, or float64 where the sources are; any strides without overlap, sharing no memory. scales: (channels,),
    of the source's type. The product is rounded to the source's type, then to the weight's, as one after the other
    would be. Raises ValueError or TypeError for lists that do not match. Under CUDA graph capture, call once
    before with tensors of the same sizes, outside the capture. Source: see the module.
    """
    written, read, factors = as_list(weights, "weights"), as_list(sources, "sources"), as_list(scales, "scales")
    if not len(written) == len(read) == len(factors):
        raise ValueError(
            f"{len(written)} weights need as many sources and scales, not {len(read)} and {len(factors)}"
        )
    for i, (weight, source, scale) in enumerate(zip(written, read, factors, strict=True)):
        types = (
            (torch.float64,) if source.dtype == torch.float64 else (torch.float32, torch.bfloat16, torch.float16)
        )
        if source.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"sources[{i}] must be float32 or float64, not {source.dtype}")
        if weight.dtype not in types or weight.dtype != written[0].dtype or scale.dtype != source.dtype:
            raise TypeError(f"weights[{i}] {weight.dtype} and scales[{i}] {scale.dtype} do not go with its source")
        if not source.dim() or weight.shape != source.shape or scale.shape != source.shape[:1]:
            shapes = f"{tuple(weight.shape)}, {tuple(source.shape)} and {tuple(scale.shape)}"
            raise ValueError(
                f"weights, sources and scales[{i}] must be alike, of a factor a channel, not {shapes}"
            )
        check_device(written[0], weight, source, scale)
    check_written(weights=written)
    FOLD(written, read, factors)
