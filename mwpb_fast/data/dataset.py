"""What a data set is: validated uint8 images, the order in which they come, and the contract of a loader.

Everything random here is a pure function of a seed, computed from counter-based words: the order of an epoch,
the validation split and subsets are the same on any machine, with any torch version and after any resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mwpb_fast.method import Batch
from mwpb_fast.system.lazy import ops, torch

if TYPE_CHECKING:
    from torch import Tensor

_SPLIT_PURPOSE = 0x5370_6C69_74  # keeps the split's words apart from those of the epochs' orders


class DataError(ValueError):
    """Bad data; one line that names the file."""


class DataWriteError(DataError):
    """Prepared data could not be written: the machine's fault, not the data's."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train on and how it is fed.

    name: digits, cifar10, cifar100, cifar4 (four classes of CIFAR-10), svhn, tinyimagenet, folder, or the dotted
    path of a module of one's own; all but digits may have a name for one of several, as in folder:cats.
    dir: holds the prepared sets, one folder each. loader: resident keeps all images on the device, dali
    streams and decodes them, auto takes resident, which measures faster (docs/performance.md), if they fit in
    half of the device's free memory. validation: fraction of the training split
    that is held out. pad, pad_mode, flip: the augmentation. last_batch: what becomes of an incomplete last
    batch. subset: train on so many images only, a stratified choice. threads: of the dali loader, 0 = one
    for each CPU core, at most 8.
    """

    name: str = "cifar10"
    dir: str = "data"
    loader: Literal["auto", "resident", "dali"] = "auto"
    batch_size: int = 128
    validation: float = 0.02
    pad: int = 4
    pad_mode: Literal["zero", "reflect"] = "zero"
    flip: bool = True
    last_batch: Literal["drop", "keep"] = "drop"
    subset: int | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        for option, allowed in (
            ("loader", ("auto", "resident", "dali")),
            ("pad_mode", ("zero", "reflect")),
            ("last_batch", ("drop", "keep")),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option} is {getattr(self, option)!r}; must be one of {', '.join(allowed)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; must be at least 1")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}; must be in [0, 1)")
        if not 0 <= self.pad <= 255:
            raise ValueError(f"pad is {self.pad}; must be in [0, 255]")
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"subset is {self.subset}; must be at least 1")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; must be at least 0")
        if self.threads > 1024:
            raise ValueError(f"threads is {self.threads}; must be at most 1024")


@dataclass(frozen=True, eq=False)
class Images:
    """A split in memory.

    images: uint8 (N, C, H, W), made channels-last. labels: int64 (N,), in [0, len(classes)).
    origin: the file, for messages. content: the hash that `sha256` is, where it is known. Raises DataError where
    any of this does not hold.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    origin: str = "images"
    content: str = ""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"{self.origin}: images are {images.dtype} {tuple(images.shape)}, need uint8 (N, C, H, W)"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self.origin}: labels are {labels.dtype} {tuple(labels.shape)}, need int64 ({len(images)},)"
            )
        if images.numel() == 0 or images.shape[1] not in (1, 3):
            raise DataError(
                f"{self.origin}: images have shape {tuple(images.shape)}, need 1 or 3 channels and N > 0"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"{self.origin}: label {low if low < 0 else high} is out of range, "
                f"there are {len(self.classes)} classes"
            )
        object.__setattr__(self, "images", images.contiguous(memory_format=torch.channels_last))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def sha256(self) -> str:
        """The hash of images and labels, which a run is bound to."""
        pixels = self.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return self.content or content_hash(pixels, self.labels.contiguous().cpu().numpy())

    def statistics(self, index: Tensor) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the images at `index`, for images in [0, 1]."""
        values = torch.arange(256, dtype=torch.float64) / 255
        means, deviations = [], []
        for channel in self.images[index].unbind(1):
            share = torch.bincount(channel.flatten().long(), minlength=256).double() / channel.numel()
            mean = share @ values
            means.append(mean.item())
            deviations.append((share @ (values - mean).square()).sqrt().item())
        return means, deviations


def content_hash(images: Any, labels: Any) -> str:
    """SHA-256 of a split: images uint8 (N, H, W, C) and labels int64 (N,), contiguous NumPy arrays."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images)
    digest.update(labels)
    return digest.hexdigest()


class Loader(Protocol):
    """Batches of a training split; `epoch(e, start)` begins at batch `start` of epoch `e`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...

    def close(self) -> None: ...


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation (n,) int64, on the CPU, in which an epoch visits n samples.

    A pure function of its arguments: the stable argsort of one 64-bit Philox word a position.
    """
    position = torch.arange(n, dtype=torch.int64)
    key = torch.tensor([ops.derive_seed(seed, epoch)], dtype=torch.int64)
    words = ops.philox_words(position, key, ops.philox.STREAM_ORDER).reshape(n, -1)
    return torch.argsort((words[:, 0] << 32) | words[:, 1], stable=True)


def stratified_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A permutation (N,) int64 of which every prefix holds the classes in the split's own proportions.

    A class's share of a prefix is right to within one sample, except for ties between classes.
    """
    shuffled = epoch_order(len(labels), ops.derive_seed(seed, _SPLIT_PURPOSE), 0)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)
    start = torch.cumsum(counts, 0) - counts
    group = labels[by_class]
    rank = torch.arange(len(labels)) - start[group]
    quantile = torch.empty(len(labels), dtype=torch.float64)
    quantile[by_class] = (2 * rank + 1).double() / (2 * counts[group]).double()
    return shuffled[torch.argsort(quantile[shuffled], stable=True)]


def split_validation(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(train_index, val_index), int64, sorted, stratified: a function of the arguments alone."""
    count = round(len(labels) * fraction)
    order = stratified_order(labels, seed)
    return order[count:].sort().values, order[:count].sort().values


def split_indices(labels: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """(train_index, val_index) as the config asks: first the validation split, then the subset."""
    train, val = split_validation(labels, config.validation)
    if config.subset is not None:
        if config.subset > len(train):
            raise DataError(f"subset is {config.subset}, but {config.name} has {len(train)} training images")
        train = train[stratified_order(labels[train])[: config.subset]].sort().values
    return train, val


def smallest_batch(images: int, config: Config) -> int:
    """How many images the smallest batch of an epoch of so many images has."""
    rest = images % config.batch_size if config.last_batch == "keep" else 0
    return rest or min(config.batch_size, images)


class Plan:
    """Which samples make up which batch, and how far they are augmented: what all loaders share.

    train_index: (n,) int64 positions in the split, or None for all of them. part: (k, n) for the k-th, counted
    from 0, of n equal parts of each batch, which n processes deal out among them.
    """

    def __init__(
        self,
        images: Images,
        config: Config,
        seed: int,
        train_index: Tensor | None,
        augment: bool = True,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.config, self.seed, self.part = config, seed, part
        self.batch_size = config.batch_size // part[1]  # of this part
        self.pad, self.flip = (config.pad, config.flip) if augment else (0, False)
        height, width = images.images.shape[2:]
        if config.pad_mode == "reflect" and self.pad >= min(height, width):
            raise DataError(f"pad is {self.pad}, too much to reflect {height}x{width} images")
        total = len(images)
        self.train_index = torch.arange(total) if train_index is None else train_index.cpu().to(torch.int64)
        n = len(self.train_index)
        if n == 0 or int(self.train_index.min()) < 0 or int(self.train_index.max()) >= total:
            raise DataError(f"the training index needs 1 or more positions in [0, {total})")
        self.batches = n // config.batch_size if config.last_batch == "drop" else -(-n // config.batch_size)
        if self.batches == 0:
            raise DataError(
                f"batch_size is {config.batch_size}, but there are only {n} training images; "
                "make it smaller or set last_batch to keep"
            )
        rest = n % config.batch_size if config.last_batch == "keep" else 0
        if uneven := [size for size in (config.batch_size, rest) if size % part[1]]:
            raise DataError(
                f"a batch of {uneven[0]} images is not to be dealt out among {part[1]} processes evenly: take "
                f"another data.batch_size{', or data.last_batch drop' if uneven[0] == rest else ''}"
            )

    def epoch(self, epoch: int, start: int) -> list[Tensor]:
        """The indices, (B,) int64 on the CPU, of each batch of the epoch from batch `start` on."""
        if not 0 <= start <= self.batches:
            raise ValueError(f"start is {start}; an epoch has {self.batches} batches")
        order = self.train_index[epoch_order(len(self.train_index), self.seed, epoch)]
        batches = order.split(self.config.batch_size)[start : self.batches]
        return [batch.chunk(self.part[1])[self.part[0]] for batch in batches]

    def key(self, epoch: int) -> Tensor:
        """The epoch's augmentation key, (1,) int64 on the CPU."""
        return torch.tensor([ops.derive_seed(self.seed, epoch)], dtype=torch.int64)
