"""Weight files, read without running code that they hold."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import types
import warnings
from collections.abc import Iterator
from os import PathLike, fspath
from typing import Any

PROTOCOL = "Unsupported operand 149"  # what PyTorch says of pickle protocol 4, whose first frame has that code


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: safetensors by suffix, else a torch file of tensors and containers.

    Code in a pickle is never run; of other types NumPy's scalars and namespaces of options are read. Raises
    ValueError, in one line that names the file, when it is missing, damaged, not a dictionary, or holds anything
    else.
    """
    import torch
    from safetensors.torch import load_file

    file = fspath(path)
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        with _harmless(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, about what is refused below in one line
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {file}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # torch's own message advises how to load the file unsafely; that advice is not passed on.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it refers to {found[1]}" if found else "it is damaged or no checkpoint"
        if PROTOCOL in str(error):
            reason = "it is written in pickle protocol 4 or later; write it again by torch.save(content, path)"
        message = f"refused checkpoint {file}: {reason}; only tensors and plain containers are loaded"
        raise ValueError(message) from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"refused checkpoint {file}: it is a TorchScript program; save its state_dict"
            ) from error
        # Damaged bytes make the parsers raise almost anything: IndexError, struct.error, AssertionError, ...
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"damaged checkpoint {file}: {first}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {file} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """Types that hold data alone and that scripts save beside weights, allowed inside the block."""
    import numpy as np
    import torch

    scalar: Any = np.float64(0).__reduce__()[0]
    types_of_numbers = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    old = (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")
    allowed: list[Any] = [*old, np.dtype, *types_of_numbers, argparse.Namespace, types.SimpleNamespace]
    with torch.serialization.safe_globals(allowed):
        yield
