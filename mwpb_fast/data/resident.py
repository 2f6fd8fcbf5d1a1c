"""The resident loader: all images as uint8 on the device, each batch by one gather-crop-flip-scale op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mwpb_fast.data.dataset import Batch, Config, Images, Plan
from mwpb_fast.system.layout import in_layout
from mwpb_fast.system.lazy import ops, torch

if TYPE_CHECKING:
    from torch import Tensor


class ResidentLoader:
    """Batches of `images` from memory of `device`.

    seed: the run's. train_index: (n,) int64 positions to train on, None for all. augment: False for the
    images as they are, in the same order. layout: of the batches' images, channels-last if None. part: as
    `Plan` has it.
    """

    def __init__(
        self,
        images: Images,
        config: Config,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        train_index: Tensor | None = None,
        augment: bool = True,
        layout: torch.memory_format | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._plan = Plan(images, config, seed, train_index, augment, part)
        self._device, self._layout = torch.device(device), layout or torch.channels_last
        self._images = images.images.to(self._device)
        self._labels = images.labels.to(self._device)

    def __len__(self) -> int:
        return self._plan.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from batch `start` on."""
        indices = self.indices(epoch, start)
        key = self.key(epoch)
        return (self.gather(index, key) for index in indices)

    def indices(self, epoch: int, start: int = 0) -> tuple[Tensor, ...]:
        """The indices, (B,) int64 on the device, of each batch of the epoch from batch `start` on."""
        parts = self._plan.epoch(epoch, start)
        if not parts:
            return ()
        return torch.cat(parts).to(self._device).split([len(part) for part in parts])  # one transfer for the epoch

    def key(self, epoch: int) -> Tensor:
        """The epoch's augmentation key, (1,) int64 on the device."""
        return self._plan.key(epoch).to(self._device)

    def gather(self, index: Tensor, key: Tensor) -> Batch:
        """The samples at `index`, their images augmented: device work alone, which can be captured."""
        plan, mode = self._plan, self._plan.config.pad_mode
        x = ops.crop_flip(self._images, index, key, pad=plan.pad, pad_mode=mode, flip=plan.flip)
        return Batch(in_layout(x, self._layout), self._labels[index], index)

    def close(self) -> None:
        """Nothing to stop; here for the loaders' common interface."""


def eval_batches(
    images: Images,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    index: Tensor | None = None,
    layout: torch.memory_format | None = None,
) -> Iterator[Batch]:
    """All images (or those at `index`, (n,) int64) as they are, in order; the last batch may be smaller.

    layout: of the batches' images, channels-last if None.
    """
    device, layout = torch.device(device), layout or torch.channels_last
    index = torch.arange(len(images)) if index is None else index.cpu()
    key = torch.zeros(1, dtype=torch.int64, device=device)
    for part in index.split(batch_size) if len(index) else ():
        pixels = images.images[part].contiguous(memory_format=torch.channels_last).to(device)
        rows = torch.arange(len(part), device=device)
        x = ops.crop_flip(pixels, rows, key, pad=0, flip=False)
        yield Batch(in_layout(x, layout), images.labels[part].to(device), part.to(device))
