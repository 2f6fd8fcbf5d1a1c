"""A model or images of the user's own code, by name: `module:name` or `file.py:name`, as in `mine.nets:net`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.system.lazy import torch

if TYPE_CHECKING:
    from mwpb_fast.evaluation.model_checks import Model

_WORD = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_NAME = re.compile(rf"({_WORD}|.+\.py):{_WORD}")


def is_name(target: Path | str) -> bool:
    """Whether that is a name and no file."""
    return bool(_NAME.fullmatch(str(target))) and not Path(target).exists()


def find_model(name: str) -> tuple[Model, bool]:
    """The module, or function from images to logits, of that name; or what it makes, where it can be called
    without arguments; and whether it was made so. A module is put into eval mode. Raises EvaluationError, in one
    line."""
    found, made = _find(name)
    if not callable(found):
        raise EvaluationError(f"{name} is no model: {type(found).__name__} cannot be called with images")
    if isinstance(found, type) and issubclass(found, torch.nn.Module):
        raise EvaluationError(
            f"{name} is a class that takes arguments: name a function without arguments that makes the model"
        )
    if isinstance(found, torch.nn.Module):
        return found.eval(), made
    model: Model = found
    return model, made


def find(name: str) -> Any:
    """What stands under that name, or what it makes, where it can be called without arguments and is no module.
    Raises EvaluationError, in one line."""
    return _find(name)[0]


def _find(name: str) -> tuple[Any, bool]:
    place, _, attribute = name.rpartition(":")
    try:
        with _folder_of(place):
            found: Any = _import(place)
            for word in attribute.split("."):
                found = _member(found, word, name)
            made = not isinstance(found, torch.nn.Module) and callable(found) and _takes_nothing(found)
            return (found() if made else found), made
    except EvaluationError:
        raise
    except Exception as error:  # the user's own code, which may raise anything
        reason = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            raise EvaluationError(
                f"{name}: No module named {error.name!r} in the current folder or among the installed packages; "
                "code in any other file is named FILE.py:NAME"
            ) from error
        raise EvaluationError(f"{name}: {type(error).__name__}: {reason}{_otherwise(name, error)}") from error


def _otherwise(name: str, error: Exception) -> str:
    """How code is named whose own imports failed under this name; "" for other errors."""
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        relative = isinstance(error, ImportError) and "relative import" in str(error)
        return "; code of a package is named PACKAGE.MODULE:NAME, from the folder that holds it" * relative
    file = Path(*place.split(".")).with_suffix(".py")
    beside = isinstance(error, ModuleNotFoundError) and file.is_file()
    return f"; named {file}:{attribute}, it finds what lies in its own folder" * beside


def _import(place: str) -> types.ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise EvaluationError(f"{place}: there is no such file")
    title = f"file {path.stem}".replace(".", "_")  # no other module can have that name, in whatever process
    known = sys.modules.get(title)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[title] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]
        raise
    return module


@contextlib.contextmanager
def _folder_of(place: str) -> Iterator[None]:
    """Inside the block a file's neighbours can be imported, as when Python runs that file."""
    folder = str(Path(place).resolve().parent)
    if not place.endswith(".py"):
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # that code may have changed the list, too
            sys.path.remove(folder)


def _member(owner: Any, word: str, name: str) -> Any:
    try:
        return getattr(owner, word)
    except AttributeError as error:
        close = difflib.get_close_matches(word, [one for one in dir(owner) if not one.startswith("_")], n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise EvaluationError(f"{name}: there is no attribute {word!r}{hint}") from error


def _takes_nothing(call: Any) -> bool:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # of code that is not Python's
        return False
    # one that takes any number of arguments is a wrapper, and waits for images
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)
