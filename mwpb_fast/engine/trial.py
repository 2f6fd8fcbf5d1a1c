"""A model tried on a few images before anything long is begun: whether it gives logits, and can be trained."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from mwpb_fast.config import ConfigError
from mwpb_fast.engine.net import module_mode
from mwpb_fast.engine.precision import Precision
from mwpb_fast.system.layout import in_layout, set_layout
from mwpb_fast.system.memory import none_left


def fault(logits: Any, images: int, classes: int) -> str:
    """What is wrong with a model's output for so many images of so many classes; empty for (B, C) logits."""
    if not isinstance(logits, torch.Tensor):
        return f"it returns a {type(logits).__name__}, not a tensor of logits (images, classes)"
    if logits.dim() != 2 or len(logits) != images or not logits.is_floating_point():
        shape = tuple(logits.shape)
        return f"for {images} images it returns {logits.dtype} {shape}, not floating logits ({images}, {classes})"
    if logits.shape[1] < classes:
        return f"it gives logits for {logits.shape[1]} classes, the data set has {classes}"
    return ""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def try_model(
    model: torch.nn.Module, name: str, x: torch.Tensor, classes: int, smallest: int, precision: Precision
) -> None:
    """Run `model` as training will, and leave weights, statistics, modes and generators as they were.

    x: (B, C, H, W) float32 images on the model's device. smallest: how many images the smallest batch has.
    Raises ConfigError, one line, where it gives no logits, or none for a batch of that size.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.name: {name} has no weights to train")
    x = in_layout(x[:2], precision.memory_format)
    with _undone(model, precision.device):
        for training in (False, True) if len(x) > 1 else (False,):
            if reason := _run(model, x, classes, training, precision):
                if channels_last_is_why(model, x, precision):
                    reason += "; it cannot take channels-last images: write --precision.channels_last false"
                raise ConfigError(f"model.name: {name} cannot be trained on these images: {reason}")
        if smallest == 1 and (reason := _run(model, x[:1], classes, True, precision)):
            raise ConfigError(
                f"model.name: {name} cannot be trained on a batch of one image, and there is one: {reason}; "
                "take --data.last_batch drop, or another --data.batch_size"
            )


def channels_last_is_why(model: torch.nn.Module, x: torch.Tensor, precision: Precision) -> bool:
    """Whether a model that fails on images x in the precision's layout works in the contiguous one; if so it and
    its weights are left in that one."""
    if precision.memory_format != torch.channels_last:
        return False
    plain = dataclasses.replace(precision, memory_format=torch.contiguous_format)
    set_layout(model, torch.contiguous_format)
    if not _run(model, in_layout(x, torch.contiguous_format), 1, False, plain):
        return True
    set_layout(model, torch.channels_last)
    return False


def _run(model: torch.nn.Module, x: torch.Tensor, classes: int, training: bool, precision: Precision) -> str:
    """Why that fails; empty where it does not."""
    try:
        with module_mode(model, training), torch.enable_grad(), precision.autocast():
            leaf = x.detach().clone().requires_grad_()
            logits = model(leaf)
        if reason := fault(logits, len(x), classes):
            return reason
        return "" if logits.requires_grad else "its logits have no gradient"
    except Exception as error:  # the model's own code, which may raise anything
        if none_left(error):
            raise
        return first_line(error)


@contextlib.contextmanager
def _undone(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
