"""Checkpoints that survive what happens to files: written atomically, verified by SHA-256, never unpickled.

A checkpoint is `<kind>-<epoch>-<batch>.pt` with a sidecar in the format of sha256sum. The sidecar is written
first; a file whose bytes do not match it is passed over for the one before. Contents are tensors and plain
types only, and a mark that tells them from any other program's.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from mwpb_fast.runs.log import note
from mwpb_fast.system.files import to_json, write_atomically

MARK = {"mwpb_fast_checkpoint": 1}  # in every state that is saved, with the number of its form
_BEFORE_THE_MARK = {"config": dict, "classes": list, "channels": int, "epoch": int, "model": dict}


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, in one line that names the file."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written: the machine's fault, not the file's."""


def save(folder: Path, kind: str, epoch: int, batch: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Save `state` as a checkpoint of `kind`; of the others of that kind keep the `keep` - 1 before it.

    Those of later epochs go too: a run that has come here had no use for them, because they were damaged.
    Raises CheckpointWriteError where the file cannot be written; earlier checkpoints are then untouched.
    """
    path = folder / f"{kind}-{epoch:05d}-{batch:07d}.pt"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    try:
        digest = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
        write_atomically(_sidecar(path), digest.encode())
        write_atomically(path, content)
        before = [other for other in existing(folder, kind) if other < path]
        for other in existing(folder, kind):
            if other != path and other not in before[: keep - 1]:
                other.unlink(missing_ok=True)
                _sidecar(other).unlink(missing_ok=True)
                weights_of(other).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointWriteError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def weights_of(path: Path) -> Path:
    """Where the weights of a checkpoint stand alone, as safetensors."""
    return path.with_suffix(".safetensors")


def save_weights(path: Path, state: dict[str, Any]) -> None:
    """Write the weights of the checkpoint `path`, whose state it is, beside it; what its other values say of them
    stands in the metadata, as JSON. Raises CheckpointWriteError."""
    from safetensors.torch import save as to_bytes

    weights = {name: value.detach().cpu().clone().contiguous() for name, value in state["model"].items()}
    about = {name: to_json(state[name]) for name in ("config", "classes", "channels", "data", "best", "epoch")}
    try:
        write_atomically(weights_of(path), to_bytes(weights, {"format": "pt", **about}))
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointWriteError(f"{weights_of(path)}: cannot be written: {reason}") from error


def is_ours(state: dict[Any, Any]) -> bool:
    """Whether a file's content is a checkpoint of this program: by its mark, or, where it was written before there
    was one, by all that such a file holds. Raises CheckpointError for one of a later version."""
    (name, form), *_ = MARK.items()
    if name not in state:
        old = all(isinstance(state.get(key), kind) for key, kind in _BEFORE_THE_MARK.items())
        return old and {"recipe", "objective", "budget"} <= state["config"].keys()
    if state[name] != form:
        raise CheckpointError(
            f"a checkpoint of another version of this program: {name} is {state[name]}, not {form}"
        )
    return True


def existing(folder: Path, kind: str) -> list[Path]:
    """Checkpoint files of a kind, newest first."""
    return sorted(folder.glob(f"{kind}-?????-???????.pt"), reverse=True)


def read(path: Path) -> dict[str, Any]:
    """The state in one checkpoint, on the CPU. Raises CheckpointError for a damaged or foreign file."""
    try:
        content = path.read_bytes()
        expected = _sidecar(path).read_text(encoding="ascii").split()[:1]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{_sidecar(path)}: not a SHA-256 sidecar") from error
    if expected != [hashlib.sha256(content).hexdigest()]:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is not that of {_sidecar(path).name}")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # Any parse failure of foreign bytes means the same to the user.
        raise CheckpointError(f"{path}: not a checkpoint of this program") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint of this program")
    return state


def read_newest(folder: Path, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of a kind, or None where there is no file of that kind. Newer ones that are
    damaged are named on stderr.

    Raises CheckpointError where there are files and all of them are damaged.
    """
    problems: list[str] = []
    for path in existing(folder, kind):
        try:
            found = path, read(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            if problems:
                note(f"{'; '.join(problems)}; {path.name} is taken in its place")
            return found
    if problems:
        raise CheckpointError("; ".join(problems))
    return None


def sweep(folder: Path) -> None:
    """Remove halves of checkpoints: a checksum without its file, which a killed process leaves, and a file without
    its checksum where a whole checkpoint of its kind is there. One that stands alone is its owner's to judge."""
    for sidecar in folder.glob("*-?????-???????.pt.sha256"):
        if not sidecar.with_suffix("").exists():
            sidecar.unlink(missing_ok=True)
    for weights in folder.glob("best-?????-???????.safetensors"):
        if not weights.with_suffix(".pt").exists():
            weights.unlink(missing_ok=True)
    for path in folder.glob("*-?????-???????.pt"):
        kind = path.name.rsplit("-", 2)[0]
        if not _sidecar(path).exists() and any(_sidecar(other).exists() for other in existing(folder, kind)):
            path.unlink(missing_ok=True)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators, from which a model or an axis of the user's may draw."""
    on_cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_cuda}


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Draw on from `state`; the generator of a device that was not there before stays as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".pt.sha256")
