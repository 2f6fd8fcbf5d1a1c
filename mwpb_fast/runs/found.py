"""Whether a path is a run's folder, and what is said of one that is not."""

from __future__ import annotations

from pathlib import Path

from mwpb_fast.config import ConfigError
from mwpb_fast.system.units import counted

DEEPEST = 3  # below the folder: those of `reproduce` are OUT/runs/NAME/seed0
NAMED = 3


def require_run(path: Path) -> None:
    """Raises ConfigError, a line that says what is there and which runs are perhaps meant, where `path` is not the
    folder of a run."""
    if not (path / "config.yaml").exists():
        raise ConfigError(_why_not(path))


def _why_not(path: Path) -> str:
    if not path.exists():
        return f"{path}: there is no such folder; the folder of a run is wanted"
    if not path.is_dir():
        run = path.parent.parent
        mine = path.parent.name == "checkpoints" and (run / "config.yaml").is_file()
        cure = f"its run is {run}" if mine else f"for the accuracy of weights: mwpb-fast evaluate {path}"
        return f"{path} is a file, where the folder of a run is wanted; {cure}"
    for depth in range(1, DEEPEST + 1):
        inside = "/".join(["*"] * depth)
        runs = sorted(found.parent for found in path.glob(f"{inside}/config.yaml"))
        if runs:
            first = " ".join(map(str, runs[:NAMED]))
            more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
            return f"{path} is not the folder of a run, but holds {counted(len(runs), 'run')}: {first}{more}"
    return f"{path} is not the folder of a run: it has no config.yaml"
