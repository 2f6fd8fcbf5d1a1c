"""A model or images of the user's own code, by name: `module:name`, as in `mine.nets:net`."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.system.lazy import torch

if TYPE_CHECKING:
    from mwpb_fast.evaluation.model_checks import Model

_WORD = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


def is_name(target: Path | str) -> bool:
    """Whether that is a name and no file."""
    return bool(re.fullmatch(f"{_WORD}:{_WORD}", str(target))) and not Path(target).exists()


def find_model(name: str) -> Model:
    """The module, or function from images to logits, of that name; or what it makes, where it can be called
    without arguments. A module is put into eval mode. Raises EvaluationError, in one line."""
    found = find(name)
    if not callable(found):
        raise EvaluationError(f"{name} is no model: {type(found).__name__} cannot be called with images")
    if isinstance(found, torch.nn.Module):
        return found.eval()
    model: Model = found
    return model


def find(name: str) -> Any:
    """What stands under that name, or what it makes, where it can be called without arguments and is no module.
    Raises EvaluationError, in one line."""
    place, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(place)
        for word in attribute.split("."):
            found = getattr(found, word)
        made = not isinstance(found, torch.nn.Module) and callable(found) and _takes_nothing(found)
        return found() if made else found
    except Exception as error:  # the user's own code, which may raise anything
        reason = " ".join(str(error).split())
        raise EvaluationError(f"{name}: {type(error).__name__}: {reason}") from error


def _takes_nothing(call: Any) -> bool:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # of code that is not Python's
        return False
    # one that takes any number of arguments is a wrapper, and waits for images
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)
