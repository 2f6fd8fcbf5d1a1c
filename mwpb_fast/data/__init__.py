"""Data sets and loaders.

prepare("cifar10", dir=Path("data"))                download, check, convert
images = load_split(config, "train")                uint8, channels-last, validated
train_index, val_index = split_indices(images.labels, config)
loader = make_loader(images, config, seed=0, device="cpu", train_index=train_index)
for batch in loader.epoch(1): ...                   batch.x, batch.y, batch.index
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mwpb_fast.data.dataset import (
    Batch,
    Config,
    DataError,
    DataWriteError,
    Images,
    Loader,
    epoch_order,
    smallest_batch,
    split_indices,
    split_validation,
    stratified_order,
)
from mwpb_fast.data.identity import KIND, difference, identity, identity_of, require_same
from mwpb_fast.data.prepare import find_set, known_sets, load_encoded, load_split, prepare
from mwpb_fast.data.prepared import require_prepared
from mwpb_fast.data.resident import ResidentLoader, eval_batches
from mwpb_fast.system import ranks
from mwpb_fast.system.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KIND",
    "Batch",
    "Config",
    "DataError",
    "DataWriteError",
    "Images",
    "Loader",
    "ResidentLoader",
    "difference",
    "epoch_order",
    "eval_batches",
    "find_set",
    "identity",
    "identity_of",
    "known_sets",
    "load_encoded",
    "load_split",
    "make_loader",
    "memory_budget",
    "prepare",
    "require_prepared",
    "require_same",
    "smallest_batch",
    "split_indices",
    "split_validation",
    "stratified_order",
]


def make_loader(
    images: Images,
    config: Config,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    train_index: Tensor | None = None,
    augment: bool = True,
    layout: torch.memory_format | None = None,
) -> Loader:
    """The loader that the config asks for; "auto" is resident if the images fit in half of the free memory.

    layout: of the batches' images, channels-last if None. Of several processes each
    has its part of every batch.

    Given the training split of a prepared set, the dali loader decodes the image files, if
    `prepare(..., encoded=True)` kept them.
    """
    device = torch.device(device)
    kind = config.loader
    if kind == "auto":
        kind = "resident" if images.images.nbytes <= memory_budget(device) else "dali"
    if kind == "resident":
        return ResidentLoader(
            images,
            config,
            seed=seed,
            device=device,
            train_index=train_index,
            augment=augment,
            layout=layout,
            part=ranks.place(),
        )
    from mwpb_fast.data.dali import DaliLoader

    return DaliLoader(
        images,
        config,
        seed=seed,
        device=device,
        train_index=train_index,
        augment=augment,
        encoded=load_encoded(config) if Path(images.origin).name == "train.safetensors" else None,
        layout=layout,
        part=ranks.place(),
    )


def memory_budget(device: torch.device) -> int:
    """Half of a GPU's free memory, in bytes; no limit on the CPU, where the images are in memory already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return 1 << 62
