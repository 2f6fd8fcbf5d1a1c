"""How this process deals with memory that tensors free, and what it looks like when there is none left."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_KEPT = 2**30
# in what PyTorch says of the CPU's, as a RuntimeError
_NONE_LEFT = ("can't allocate memory", "not enough memory", "std::bad_alloc")


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 1 GiB for the next allocation; returns whether it does.

    By default it hands every block above some megabytes back to the system, so that each large activation of
    each step is mapped, and cleared by the kernel, anew.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def none_left(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the CPU or another device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NONE_LEFT)
