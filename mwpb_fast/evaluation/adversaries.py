"""The images that an attack found, in one file, from which anyone can check them again.

A safetensors file holds x_adv and the natural images x (N, C, H, W), y, index and predicted (N,) int64, and radius
(N,) float64. Images are float32 in [0, 1], or uint8, to be divided by 255, where that loses nothing; `uint8_exact`
in the metadata says whether x_adv is so. There stand attack, norm, eps, seed and the hash of the model, too.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.system.files import write_atomically
from mwpb_fast.system.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mwpb_fast.evaluation.sharded import ShardedAttack

FORMAT = "mwpb-fast adversarial images 1"
TENSORS = ("x_adv", "x", "y", "index", "predicted", "radius")


def packed(x: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) float32 as uint8 where that loses nothing, else as they are; on the CPU."""
    levels = (255 * x).round().to(torch.uint8)
    return (levels if torch.equal(unpacked(levels), x) else x).cpu().contiguous()


def unpacked(x: torch.Tensor) -> torch.Tensor:
    """Images as float32 in [0, 1]."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def write_shard(path: Path, x_adv: torch.Tensor) -> None:
    """Keep the images of one shard."""
    write_atomically(path, _bytes({"x_adv": x_adv.float().cpu().contiguous()}, {}))


def write(path: Path, attack: ShardedAttack, about: Mapping[str, str]) -> None:
    """Put the shards' images into one file, and remove theirs. about: what else to say in the metadata."""
    parts = {number: attack.images_path(number) for number in range(len(attack.shards))}
    if path.exists() and not any(part.exists() for part in parts.values()):
        return
    before = read(path)[0]["x_adv"].split([len(shard) for shard in attack.shards]) if path.exists() else []
    found = [_load(part)[0]["x_adv"] if part.exists() else before[number] for number, part in parts.items()]
    x, y = attack.load(attack.index)
    records = [attack.records[number] for number in parts]
    radii = [radius for record in records for radius in record["values"].get("radius", [])]
    x_adv = packed(torch.cat([unpacked(part) for part in found]))
    tensors = {
        "x_adv": x_adv,
        "x": packed(x.contiguous()),
        "y": y.cpu(),
        "index": attack.index,
        "predicted": torch.tensor([one for record in records for one in record["predicted"]]),
        "radius": torch.tensor(radii or [float(attack.setting.eps)] * len(y), dtype=torch.float64),
    }
    eps = "" if attack.attack.per_image else str(attack.setting.eps)
    exact = str(x_adv.dtype == torch.uint8).lower()
    what = {"attack": attack.name, "norm": attack.setting.norm, "eps": eps}
    write_atomically(path, _bytes(tensors, {"format": FORMAT, "uint8_exact": exact, **what, **about}))
    for part in parts.values():
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, images as float32 in [0, 1], and the metadata of such a file. Raises EvaluationError."""
    tensors, about = _load(path)
    if about.get("format") != FORMAT or set(tensors) != set(TENSORS):
        raise EvaluationError(f"{path}: holds no adversarial images that `evaluate --save-images` has written")
    shape, n = tensors["x"].shape, len(tensors["x"])
    if (
        tensors["x_adv"].shape != shape
        or len(shape) != 4
        or any(tensors[name].shape != (n,) for name in TENSORS[2:])
    ):
        raise EvaluationError(f"{path}: damaged, its tensors are of different lengths")
    return tensors | {name: unpacked(tensors[name]) for name in ("x_adv", "x")}, about


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error


def _bytes(tensors: dict[str, Any], about: Mapping[str, str]) -> bytes:
    from safetensors.torch import save

    content: bytes = save(tensors, dict(about))
    return content
