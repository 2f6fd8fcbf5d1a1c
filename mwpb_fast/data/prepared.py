"""Finding a data set by its name, and loading it from its prepared files.

`<dir>/<name>/` holds train.safetensors and test.safetensors (images: uint8 (N, H, W, C), labels: int64 (N,)),
train.encoded.safetensors if asked for (the image files themselves: bytes, offsets, labels), and meta.json, which
holds the SHA-256 of each file and, as `content`, that of each split's images and labels.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwpb_fast.data.dataset import Config, DataError, Images
from mwpb_fast.data.store import read_tensors
from mwpb_fast.meant import meant
from mwpb_fast.system.files import is_whole

if TYPE_CHECKING:
    from types import ModuleType

    from mwpb_fast.data.decode import Packed

FORMAT = 1
SPLITS = ("train", "test")


def split_name(name: str) -> tuple[str, str]:
    """folder:cats as folder and cats, which tells it from others of its kind; cifar10 as cifar10 and nothing."""
    base, colon, label = name.partition(":")
    if colon and not re.fullmatch(r"\w[\w.-]*", label):
        raise DataError(f"{name!r} is not a set's name: after the colon write letters, digits, _, . and -")
    return base, label


def find_set(name: str) -> ModuleType:
    """The module that reads the set: the file of that name, less a number at its end, or a dotted path."""
    full, (name, label) = name, split_name(name)
    paths = [name] if "." in name else [f"{__package__}.{name}", f"{__package__}.{name.rstrip('0123456789')}"]
    for path in paths if re.fullmatch(r"\w+(\.\w+)*", name) else []:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is not None and not path.startswith(error.name):
                raise
            continue
        if name in getattr(module, "NAMES", (name,) if "." in name else ()):
            if label and hasattr(module, "images"):
                raise DataError(f"{full!r}: {name} is embedded, and there is one of it")
            return module
    raise DataError(f"{name!r} is not a known data set{meant(name, known_sets())}")


def known_sets() -> list[str]:
    """The names of the sets in this folder."""
    package = importlib.import_module(str(__package__))
    modules = [
        importlib.import_module(f"{__package__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
    return sorted(name for module in modules for name in getattr(module, "NAMES", ()))


def load_split(config: Config, split: str) -> Images:
    """The train or test split of the configured set, verified; DataError if it is not there or not right."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; must be one of {', '.join(SPLITS)}")
    module = find_set(config.name)
    if hasattr(module, "images"):
        return module.images(config.name, split)
    folder = set_folder(config.dir, config.name)
    meta = read_meta(folder, config.name)
    record = meta["splits"][split]
    path = folder / record["file"]
    tensors = read_tensors(path, record["sha256"], ("images", "labels"))
    images, labels = tensors["images"], tensors["labels"]
    shape = (record["count"], meta["height"], meta["width"], meta["channels"])
    if tuple(images.shape) != shape:
        raise DataError(f"{path}: images have shape {tuple(images.shape)}, meta.json says {shape}")
    if len(meta["classes"]) < 2:
        raise DataError(f"{path}: has one class, {meta['classes'][0]}; there is nothing to tell it from")
    content = record.get("content", "")  # older versions did not write it
    return Images(images.permute(0, 3, 1, 2), labels, tuple(meta["classes"]), origin=str(path), content=content)


def require_prepared(config: Config) -> None:
    """Raises DataError where the configured set is not there; its images are not read."""
    if not hasattr(find_set(config.name), "images"):
        read_meta(set_folder(config.dir, config.name), config.name)


def load_encoded(config: Config) -> Packed | None:
    """The image files of the training split, in the order of `load_split`, or None if they were not kept."""
    from mwpb_fast.data.decode import Packed

    if hasattr(find_set(config.name), "images"):
        return None
    folder = set_folder(config.dir, config.name)
    record = read_meta(folder, config.name)["splits"]["train"]
    if "encoded" not in record:
        return None
    path = folder / record["encoded"]["file"]
    tensors = read_tensors(path, record["encoded"]["sha256"], ("bytes", "offsets"))
    packed = Packed(tensors["bytes"].numpy(), tensors["offsets"].numpy())
    if len(packed) != record["count"] or packed.offsets[0] != 0 or packed.offsets[-1] != len(packed.data):
        raise DataError(f"{path}: its offsets do not fit its bytes")
    if (packed.offsets[1:] <= packed.offsets[:-1]).any():
        raise DataError(f"{path}: its offsets do not rise")
    return packed


def set_folder(dir: Path | str, name: str) -> Path:
    """Where a set is prepared: data/cifar10, data/folder-cats for folder:cats, data/pets for mine.pets."""
    base, label = split_name(name)
    return Path(dir) / "-".join(filter(None, (base.rsplit(".", 1)[-1], label)))


def read_meta(folder: Path, name: str) -> dict[str, Any]:
    """The description of a prepared set; DataError where it is not there, damaged, or of a set of another name."""
    path = folder / "meta.json"
    if not path.is_file():
        where = "" if folder.parent == Path("data") else f" --dir {shlex.quote(str(folder.parent))}"
        raise DataError(
            f"{path}: missing; run `mwpb-fast data prepare {name}{where}` first, or say where it is: "
            "--data.dir DIR (--data-dir DIR of evaluate, trust, verify and reproduce)"
        )
    try:
        meta = json.loads(path.read_bytes())
        complete = meta["format"] == FORMAT and all(
            meta[key] for key in ("classes", "height", "width", "channels")
        )
        complete = complete and all(
            meta["splits"][split][key] for split in SPLITS for key in ("file", "count", "sha256")
        )
        complete = complete and isinstance(meta["classes"], list) and is_whole(meta)
    except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError):
        complete = False
    if not complete:
        raise DataError(f"{path}: damaged or of another version; run `mwpb-fast data prepare {name} --replace`")
    if meta.get("name", name) != name:
        raise DataError(f"{path}: is of {meta['name']}, not {name}; take another --data.dir for one of them")
    return meta
