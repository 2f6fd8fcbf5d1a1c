"""Adversarial weight perturbation: the step in weight space and its undoing, over all tensors at once.

w <- w + v with v = gamma * ||w|| * d / (||d|| + eps) for every tensor w and its direction d: Wu, Xia and Wang,
"Adversarial weight perturbation helps robust generalization", NeurIPS 2020. A model has dozens of small
tensors, so on either device all of them share one pass for the norms and one for the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mwpb_kernels.op import Compile, Op, number, tl, triton, writes_in_place
from mwpb_kernels.tensorlist import (
    BLOCK,
    LAUNCH_TYPES,
    MOST_PARTS,
    TABLE_COMPILE,
    as_list,
    check_lists,
    check_written,
    flat_lists,
    launch_arguments,
    part_of,
    tensor_at,
    write_back,
)


# reference ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def awp_perturb_reference(
    params: list[Tensor], perturbations: list[Tensor], directions: list[Tensor], gamma: float, eps: float
) -> None:
    if not params:
        return
    weight = torch.stack(torch._foreach_norm(params, 2, dtype=torch.float64))
    direction = torch.stack(torch._foreach_norm(directions, 2, dtype=torch.float64))
    scales = torch.where(direction == 0, 0.0, gamma * weight / (direction + eps))
    steps = [scale.to(d.dtype) * d for scale, d in zip(scales.unbind(), directions, strict=True)]
    torch._foreach_copy_(perturbations, steps)
    torch._foreach_add_(params, perturbations)


@torch.no_grad()
def awp_restore_reference(params: list[Tensor], perturbations: list[Tensor]) -> None:
    if params:
        torch._foreach_sub_(params, perturbations)


# Triton ------------------------------------------------------------------------------------------------------
@triton.jit
def _awp_norms_kernel(
    table_ptr,  # (3, T) addresses of the weights, perturbations, directions
    layout_ptr,  # (T, 4) elements, blocks a part, first part, parts
    owner_ptr,  # (parts,) tensor of every part
    squares_ptr,  # (parts, 2) float64
    tensors,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, owner, numel, _first, _parts, start, blocks = part_of(layout_ptr, owner_ptr, ALIGNED, BLOCK)
    w_ptr = tensor_at(table_ptr, owner, ALIGNED)
    d_ptr = tensor_at(table_ptr, 2 * tensors + owner, ALIGNED)
    weight = tl.zeros((BLOCK,), tl.float64)
    direction = tl.zeros((BLOCK,), tl.float64)
    for block in range(blocks):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + at, mask=at < numel, other=0.0).to(tl.float64)
        d = tl.load(d_ptr + at, mask=at < numel, other=0.0).to(tl.float64)
        weight += w * w
        direction += d * d
    tl.store(squares_ptr + part * 2, tl.sum(weight, 0))
    tl.store(squares_ptr + part * 2 + 1, tl.sum(direction, 0))


@triton.jit
def _awp_perturb_kernel(
    table_ptr,  # (3, T) addresses of the weights, perturbations, directions
    layout_ptr,  # (T, 4) elements, blocks a part, first part, parts
    owner_ptr,  # (parts,) tensor of every part
    squares_ptr,  # (parts, 2) float64
    tensors, gamma, eps,
    ALIGNED: tl.constexpr, MOST_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _part, owner, numel, first, parts, start, blocks = part_of(layout_ptr, owner_ptr, ALIGNED, BLOCK)
    w_ptr = tensor_at(table_ptr, owner, ALIGNED)
    v_ptr = tensor_at(table_ptr, tensors + owner, ALIGNED)
    d_ptr = tensor_at(table_ptr, 2 * tensors + owner, ALIGNED)
    other = tl.arange(0, MOST_PARTS)
    row = squares_ptr + (first + other) * 2
    weight = tl.sqrt(tl.sum(tl.load(row, mask=other < parts, other=0.0), 0))
    direction = tl.sqrt(tl.sum(tl.load(row + 1, mask=other < parts, other=0.0), 0))
    scale = tl.where(direction == 0.0, 0.0, gamma * weight / (direction + eps)).to(tl.float32)
    for block in range(blocks):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        step = scale * tl.load(d_ptr + at, mask=at < numel)
        w = tl.load(w_ptr + at, mask=at < numel)
        tl.store(v_ptr + at, step, mask=at < numel)
        tl.store(w_ptr + at, w + step, mask=at < numel)


@triton.jit
def _awp_restore_kernel(
    table_ptr,  # (2, T) addresses of the weights, perturbations
    layout_ptr,  # (T, 4) elements, blocks a part, first part, parts
    owner_ptr,  # (parts,) tensor of every part
    tensors,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _part, owner, numel, _first, _parts, start, blocks = part_of(layout_ptr, owner_ptr, ALIGNED, BLOCK)
    w_ptr = tensor_at(table_ptr, owner, ALIGNED)
    v_ptr = tensor_at(table_ptr, tensors + owner, ALIGNED)
    for block in range(blocks):
        at = start + block * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + at, mask=at < numel)
        v = tl.load(v_ptr + at, mask=at < numel)
        tl.store(w_ptr + at, w - v, mask=at < numel)


# launchers ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def awp_perturb_triton(
    params: list[Tensor], perturbations: list[Tensor], directions: list[Tensor], gamma: float, eps: float
) -> None:
    if any(p.dtype == torch.float64 for p in params):
        return awp_perturb_reference(params, perturbations, directions, gamma, eps)
    if not any(p.numel() for p in params):
        return None
    weights, steps, sources = flat_lists(params, perturbations, directions)
    grid, arguments = launch_arguments(weights, steps, sources)
    squares = torch.empty((grid[0], 2), dtype=torch.float64, device=params[0].device)
    _awp_norms_kernel[grid](squares_ptr=squares, **arguments)
    _awp_perturb_kernel[grid](squares_ptr=squares, gamma=gamma, eps=eps, MOST_PARTS=MOST_PARTS, **arguments)
    write_back(params, weights)
    write_back(perturbations, steps)
    return None


@torch.no_grad()
def awp_restore_triton(params: list[Tensor], perturbations: list[Tensor]) -> None:
    if any(p.dtype == torch.float64 for p in params):
        return awp_restore_reference(params, perturbations)
    if not any(p.numel() for p in params):
        return None
    weights, steps = flat_lists(params, perturbations)
    grid, arguments = launch_arguments(weights, steps)
    _awp_restore_kernel[grid](**arguments)
    write_back(params, weights)
    return None


# registration ------------------------------------------------------------------------------------------------
def weight_samples(device: torch.device) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Weights and directions: empty, a scalar, odd sizes, one of zeros, float64, a small ResNet's worth."""
    generator = torch.Generator().manual_seed(0)
    resnet = [(64, 3, 3, 3), *[(64, 64, 3, 3)] * 4, (128, 64, 3, 3), (128, 64, 1, 1), (10, 512)]
    for shapes, dtype in (
        ([(0, 3)], torch.float32),
        ([()], torch.float32),
        ([(3,), (0,), (5, 7), (4, 3, 3, 3), (2, 3, 5, 2, 3)], torch.float32),
        ([(3, 5), (2, 3, 3, 3)], torch.float64),
        (resnet, torch.float32),
    ):
        weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        directions = [torch.randn(shape, generator=generator, dtype=dtype) * 1e-3 for shape in shapes]
        if len(shapes) == 5:
            directions[2].zero_()
        for group in (weights, directions):
            for i, t in enumerate(group):
                group[i] = t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        yield [w.to(device) for w in weights], [d.to(device) for d in directions]


def nbytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


AWP_PERTURB = Op(
    schema="awp_perturb_(Tensor(a!)[] params, Tensor(b!)[] perturbations, Tensor[] directions, "
    "float gamma, float eps) -> ()",
    reference=awp_perturb_reference,
    fake=writes_in_place,
    triton=awp_perturb_triton,
    mutates=(0, 1),
    samples=lambda device: (
        (weights, [torch.full_like(w, torch.nan) for w in weights], directions, 0.01, 1e-20)
        for weights, directions in weight_samples(device)
    ),
    # the norms are needed before the update, so weights and directions are read twice
    bytes_moved=lambda params, perturbations, directions, gamma, eps: 6 * nbytes(params),
    compiles=(
        Compile(
            kernel=_awp_norms_kernel,
            signature={**LAUNCH_TYPES, "squares_ptr": "*fp64"},
            constants={"ALIGNED": True, "BLOCK": BLOCK},
            max_registers=96,
        ),
        Compile(
            kernel=_awp_perturb_kernel,
            signature={**LAUNCH_TYPES, "squares_ptr": "*fp64", "gamma": "fp32", "eps": "fp32"},
            constants={"ALIGNED": True, "MOST_PARTS": MOST_PARTS, "BLOCK": BLOCK},
            max_registers=96,
        ),
    ),
)
AWP_RESTORE = Op(
    schema="awp_restore_(Tensor(a!)[] params, Tensor[] perturbations) -> ()",
    reference=awp_restore_reference,
    fake=writes_in_place,
    triton=awp_restore_triton,
    mutates=(0,),
    samples=weight_samples,
    bytes_moved=lambda params, perturbations: 3 * nbytes(params),
    compiles=(
        Compile(
            kernel=_awp_restore_kernel,
            signature=LAUNCH_TYPES,
            constants={"ALIGNED": True, "BLOCK": BLOCK},
            max_registers=64,
        ),
        TABLE_COMPILE,
    ),
)


# public functions --------------------------------------------------------------------------------------------
@torch.no_grad()
def awp_perturb_(
    params: Iterable[Tensor],
    directions: Iterable[Tensor],
    gamma: float,
    eps: float = 1e-20,
    perturbations: Iterable[Tensor] | None = None,
) -> list[Tensor]:
    """Move every weight tensor w, in place, by v = gamma * ||w|| * d / (||d|| + eps) along its direction d.

    params: tensors of any shapes, float32 or float64, any strides without overlap, sharing no memory; leaves
    that require grad are moved as an optimizer moves them. directions: one for each, same shape and type, any
    strides. gamma: the size of the perturbation relative to each tensor's l2 norm. eps: not negative.
    perturbations: tensors to hold v (any strides without overlap), kept from an earlier call; else new ones.

    Returns the list of v, which `awp_restore_` subtracts. Norms are summed in float64. A zero direction or a
    zero weight gives v = 0; a NaN in w or d makes all of that tensor's v and w NaN, and an infinite d gives
    NaN where it is infinite. Raises ValueError or TypeError for lists that do not match.
    Under CUDA graph capture, call once before with tensors of the same sizes, outside the capture.
    Source: Wu, Xia and Wang, NeurIPS 2020, Eq. 7 and 8, and the authors' released code.
    """
    moved, along = as_list(params, "params"), as_list(directions, "directions")
    by = [torch.empty_like(p) for p in moved] if perturbations is None else as_list(perturbations, "perturbations")
    check_lists(moved, directions=along, perturbations=by)
    check_written(params=moved, perturbations=by)
    gamma, eps = number(gamma, "gamma"), number(eps, "eps")
    if not (gamma >= 0 and eps >= 0):
        raise ValueError(f"gamma and eps must not be negative, not {gamma} and {eps}")
    AWP_PERTURB(moved, by, along, gamma, eps)
    return by


@torch.no_grad()
def awp_restore_(params: Iterable[Tensor], perturbations: Iterable[Tensor]) -> None:
    """Subtract from every weight tensor, in place, the perturbation that `awp_perturb_` added.

    params, perturbations: as `awp_perturb_` takes and returns them; the weights may have been updated in
    between. (w + v) - v equals w up to one rounding of w + v. Errors: as `awp_perturb_`.
    """
    moved, by = as_list(params, "params"), as_list(perturbations, "perturbations")
    check_lists(moved, perturbations=by)
    check_written(params=moved)
    AWP_RESTORE(moved, by)
