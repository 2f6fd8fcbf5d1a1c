"""Files of weights, for models that the project builds and for modules of the user's own code."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mwpb_fast.evaluation.model_checks import EvaluationError, Model
from mwpb_fast.evaluation.named import find_model
from mwpb_fast.models import load_weights, read_checkpoint
from mwpb_fast.runs import checkpoint


@dataclass(frozen=True)
class Named:
    """A model in code, filled. about: the entries of a result that say what it is. doubts: as in a result."""

    model: Model
    about: dict[str, Any]
    doubts: dict[str, Any] = field(default_factory=dict)


def read_file(path: Path) -> dict[str, Any]:
    """The content of a file of weights; one with a SHA-256 sidecar, as every checkpoint of a run has one, is held
    to it. Raises CheckpointError, in one line."""
    if path.suffix == ".py":
        raise checkpoint.CheckpointError(
            f"{path}: is code; say which name in it is the model, as {path}:NAME or MODULE:NAME"
        )
    if path.suffix == ".pt" and path.with_suffix(".pt.sha256").exists():
        return checkpoint.read(path)
    try:
        return read_checkpoint(path)
    except ValueError as error:
        raise checkpoint.CheckpointError(str(error)) from error


def named_model(name: str, weights: str = "") -> Named:
    """The model of that name, see `find_model`, and in it the weights of a file, strictly.

    weights: FILE, or FILE:PLACE where several sets of weights are in it, see `load_weights`. Raises
    EvaluationError and CheckpointError, in one line.
    """
    model, made = find_model(name)
    about: dict[str, Any] = {"model": name}
    if not weights:
        if made and isinstance(model, torch.nn.Module) and next(model.parameters(), None) is not None:
            about["made"] = (
                f"{name} was called and made its model anew, and no file of weights was read into it here: unless "
                "that code read one itself, the weights are random; --weights FILE fills it"
            )
        return Named(model, about)
    path, place = split(weights)
    state = read_file(path)
    if not isinstance(model, torch.nn.Module):
        raise EvaluationError(
            f"--weights fills a module; {name} is {type(model).__name__}, with no names for them"
        )
    try:
        loaded = load_weights(model, state, place, normalize=False)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:  # of the user's own module
        raise EvaluationError(f"{path} into {name}: {' '.join(str(error).split())}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    about |= {"checkpoint": path.name, "sha256": digest, "weights": f"{loaded}, of {path.name}"}
    return Named(model, about, {"normalisation": {"message": loaded.doubt, "shards": []}} if loaded.doubt else {})


def split(weights: str) -> tuple[Path, str]:
    """FILE or FILE:PLACE."""
    weights = os.path.expanduser(weights)
    file, colon, place = weights.rpartition(":")
    return (Path(weights), "") if not colon or Path(weights).exists() else (Path(file), place)
