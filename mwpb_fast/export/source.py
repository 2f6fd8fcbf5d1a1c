"""The model that is exported, and what is known of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mwpb_fast import data
from mwpb_fast.config import Config
from mwpb_fast.evaluation.checkpoint import finished_epoch, own_config, read_weights
from mwpb_fast.models import Statistics, build_model, load_weights
from mwpb_fast.runs.checkpoint import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint's model, in float32 and eval mode on the CPU: the averaged weights where the run averages them.

    target, which: as they were asked for. path, sha256: of the checkpoint's file. size: height and width of its
    images. normalize: mean and deviation of each channel, which the model's first layer applies.
    """

    target: Path
    which: str
    path: Path
    sha256: str
    config: Config
    epoch: int
    averaged: bool
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    normalize: Statistics | None
    model: nn.Module


def read_source(target: Path, which: str) -> Source:
    """Of a run's folder or one of its checkpoints; the data set need not be there. Raises CheckpointError and
    ConfigError, one line each."""
    path, state = read_weights(target, which)
    config = own_config(path, state)
    if config is None:
        raise CheckpointError(f"{path}: holds weights only; what is exported is a run or a checkpoint of one")
    about = data.identity_of(state)
    if "height" not in about:
        raise CheckpointError(
            f"{path}: of an earlier version, does not say how large its images are; go on with its run first"
        )
    classes, channels = tuple(about["classes"]), int(about["channels"])
    try:
        model = build_model(
            config.model.name, num_classes=len(classes), channels=channels, normalize=state["normalize"]
        )
        load_weights(model, state.get("ema") or state["model"])
    except (ValueError, TypeError, AttributeError, ImportError, LookupError) as error:  # of the user's own code
        raise CheckpointError(f"{path.name}: {error}") from error
    return Source(
        target=target,
        which=which,
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        config=config,
        epoch=finished_epoch(state),
        averaged=config.optim.ema > 0,  # a best checkpoint has the average in the place of the weights
        classes=classes,
        channels=channels,
        size=(about["height"], about["width"]),
        normalize=state["normalize"],
        model=model.eval(),
    )
