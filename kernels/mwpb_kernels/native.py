"""The native CPU library: the file that this processor loads, or the cause where there is none to load."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# An installation that built no library leaves this file in this folder, with the cause in one line.
MARKER = "no_native.txt"


def load_native() -> tuple[str | None, str]:
    """Load the library that was built for this processor.

    Returns its file's name and an empty text, or None and why there is none, in one line. Nothing is raised.
    """
    folder = Path(__file__).parent
    level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    path = folder / f"libmwpb_{level}.so"
    if not path.exists():
        return None, _absent(folder, path.name)
    theirs, ours = _elf(path), _elf(Path(sys.executable or ""))
    if theirs and ours and theirs != ours:  # The loader itself would only say "no such file".
        return None, f"{path.name} is not for this processor: built for another processor"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        message = one_line(error.__cause__ or error)
        return None, f"{path.name} does not load; it was built against another PyTorch, or elsewhere ({message})"
    return path.name, ""


def _absent(folder: Path, name: str) -> str:
    others = sorted(path.name for path in folder.glob("libmwpb_*.so"))
    if others:
        return f"{name} is not there, only {', '.join(others)}: built for another processor"
    try:
        return one_line((folder / MARKER).read_text(encoding="utf-8"))
    except OSError:
        return f"nothing was built in {folder}: install the package, rather than only naming its folder"


def _elf(path: Path) -> bytes:
    """Word size, byte order and machine of an ELF file; empty for another file."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError:
        return b""
    return head[4:6] + head[18:20] if head.startswith(b"\x7fELF") else b""


def one_line(text: object) -> str:
    """A message, or an exception's, on one line."""
    return " ".join(str(text).split())
