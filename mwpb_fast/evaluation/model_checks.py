"""A model as an evaluation wants it: checked, its weights fixed, and known by its hash."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mwpb_fast.config import ConfigError
from mwpb_fast.system.lazy import torch
from mwpb_fast.system.plain import is_plain, ordered

if TYPE_CHECKING:
    from mwpb_fast.engine.precision import Precision


Model = Callable[["torch.Tensor"], "torch.Tensor"]
"""A module, or any other function, from images (B, C, H, W) to logits (B, classes)."""


class EvaluationError(ConfigError):
    """Why an evaluation cannot be done or trusted, in one line."""


def check_model(model: torch.nn.Module, precision: Precision) -> None:
    """Raises EvaluationError for a model in train mode, with weights not in float32, or on another device."""
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise EvaluationError(
            f"{training[0]} is in train mode: batch normalisation would depend on its batch; "
            "call model.eval() before evaluating"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise EvaluationError(f"{name} is {tensor.dtype}: call model.float(), evaluation is done in float32")
        if tensor.device.type != precision.device.type:
            raise EvaluationError(f"the model is on {tensor.device}, the evaluation on {precision.device}")


def hash_model(model: torch.nn.Module) -> str:
    """SHA-256 of the structure, weights and buffers (those too that are not in the state dict)."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def hash_attributes(model: torch.nn.Module) -> str:
    """SHA-256 of what else of a model is plain: numbers, text and tensors that are attributes of its modules."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            if isinstance(value, torch.Tensor):
                value = (str(value.dtype), tuple(value.shape), tensor_bytes(value))
            if is_plain(value):
                digest.update(f"{name}.{key}={ordered(value)!r}\n".encode())
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Its numbers, as they lie in memory when it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def weights_frozen(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block no weight asks for a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
