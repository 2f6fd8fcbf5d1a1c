"""A run as the processes of a launch take it up: who holds its folder, and what its batches are."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from mwpb_fast.config import Config, ConfigError
from mwpb_fast.runs.folder import training_lock
from mwpb_fast.system import ranks

SCALES = {"constant": lambda count: 1.0, "linear": float, "sqrt": math.sqrt}  # of the learning rate


@contextlib.contextmanager
def together(config: Config, folder: Path) -> Iterator[Config]:
    """The folder for this run alone, and the processes that torchrun has started joined; yields the configuration
    for all of them. Raises as `training_lock` and `ranks.joined`, ConfigError for what several cannot do."""
    asked = config.precision
    if ranks.launched() > 1 and asked.compile:
        raise ConfigError("precision.compile: not with several processes; leave it false")
    if ranks.launched() > 1 and asked.training not in ("auto", "plain"):
        raise ConfigError(f"precision.training: {asked.training}: not with several processes; take plain")
    cuda = asked.device != "cpu" and torch.cuda.is_available()
    with ranks.joined(cuda), training_lock(folder) if ranks.leads() else contextlib.nullcontext():
        yield whole_batch(config, ranks.count())


def whole_batch(config: Config, count: int) -> Config:
    """The same run with the batch and the learning rate that `per_rank` means for so many processes, in place of
    it: so it can go on with any number."""
    rule = config.distributed.per_rank
    if rule == "none":
        return config
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=config.data.batch_size * count),
        optim=dataclasses.replace(config.optim, lr=config.optim.lr * SCALES[rule](count)),
        distributed=dataclasses.replace(config.distributed, per_rank="none"),
    )
