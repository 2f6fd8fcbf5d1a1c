"""Packages that a run can do without: found missing or broken without stopping what does not need them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType


@dataclass(frozen=True)
class Attempt:
    """What became of an import. module: None where it failed. why: then, what to say after the package's name.
    broken: the package is there, and does not import."""

    module: ModuleType | None
    why: str = ""
    broken: bool = False

    def cure(self, package: str, extra: str = "") -> str:
        """The command that brings the package, or the extra of mwpb-fast that has it; for one that is there and
        broken, that replaces it and nothing else."""
        if self.broken:
            return f"pip install --force-reinstall --no-deps {package}"
        return f"pip install 'mwpb-fast[{extra}]'" if extra else f"pip install {package}"


def attempt(*names: str) -> Attempt:
    """Import modules of one optional package, and give the first; whatever they raise is told, not raised."""
    try:
        modules = [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        if f"{names[0]}.".startswith(f"{error.name}."):
            return Attempt(None, "is not installed")
        return _broken(error)
    except (Exception, SystemExit) as error:  # of another release, for another Python, half removed, ...
        return _broken(error)
    spec = getattr(modules[0], "__spec__", None)
    if spec is not None and spec.origin is None:  # a mere folder of that name, somewhere on the module path
        return Attempt(None, "is not installed")
    return Attempt(modules[0])


def version_of(package: str) -> str | None:
    """The version of an installed distribution; None where none of that name is known to be installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _broken(error: BaseException) -> Attempt:
    message = " ".join(str(error).split())
    return Attempt(None, f"does not import ({type(error).__name__}{': ' if message else ''}{message})", True)
