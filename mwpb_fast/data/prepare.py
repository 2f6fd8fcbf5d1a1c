"""Turns a data set, from wherever it is, into checked files that load at once, and loads them.

`<dir>/<name>/` gets train.safetensors and test.safetensors (images: uint8 (N, H, W, C), labels: int64 (N,)),
train.encoded.safetensors if asked for (the image files themselves: bytes, offsets, labels), and last
meta.json, which holds the SHA-256 of each. Every file appears whole or not at all.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwpb_fast.data.dataset import Config, DataError, Images
from mwpb_fast.data.store import read_tensors, save_arrays, write_whole

if TYPE_CHECKING:
    from types import ModuleType

    from mwpb_fast.data.decode import Packed, RawSet
    from mwpb_fast.data.download import Progress

FORMAT = 1
_SPLITS = ("train", "test")


def find_set(name: str) -> ModuleType:
    """The module that reads the set: the file of that name, less a number at its end, or a dotted path."""
    paths = [name] if "." in name else [f"{__package__}.{name}", f"{__package__}.{name.rstrip('0123456789')}"]
    for path in paths if re.fullmatch(r"\w+(\.\w+)*", name) else []:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is not None and not path.startswith(error.name):
                raise
            continue
        if name in getattr(module, "NAMES", (name,) if "." in name else ()):
            return module
    raise DataError(f"{name!r} is not a known data set; there are {', '.join(known_sets())}")


def known_sets() -> list[str]:
    """The names of the sets in this folder."""
    package = importlib.import_module(str(__package__))
    modules = [
        importlib.import_module(f"{__package__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
    return sorted(name for module in modules for name in getattr(module, "NAMES", ()))


def prepare(
    name: str,
    *,
    source: Path | None = None,
    dir: Path = Path("data"),
    encoded: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prepare a set into `<dir>/<name>` and return its description (the content of meta.json).

    source: the set's archive or folder, or a folder that holds the archive; without it a prepared set is
    verified and kept, and otherwise the set is downloaded to `<dir>/downloads`, unless `offline`.
    encoded: keep the image files too, for the dali loader to decode. Raises DataError.
    """
    module = find_set(name)
    target = _folder(dir, name)
    if hasattr(module, "images"):
        return {
            "name": name,
            "embedded": True,
            "splits": {s: {"count": len(module.images(name, s))} for s in _SPLITS},
        }
    if source is None and (target / "meta.json").is_file():
        meta = _meta(target, name)
        if not encoded or "encoded" in meta["splits"]["train"]:
            for split in _SPLITS:
                load_split(Config(name=name, dir=str(dir)), split)
            return meta
    path, origin = _locate(module, name, source, Path(dir), offline, progress)
    from mwpb_fast.data.archive import open_tree

    with open_tree(path) as tree:
        raw = module.read(tree, name)
        return _write(target, name, raw, origin, encoded)


def load_split(config: Config, split: str) -> Images:
    """The train or test split of the configured set, verified; DataError if it is not there or not right."""
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; must be one of {', '.join(_SPLITS)}")
    module = find_set(config.name)
    if hasattr(module, "images"):
        return module.images(config.name, split)
    folder = _folder(config.dir, config.name)
    meta = _meta(folder, config.name)
    record = meta["splits"][split]
    path = folder / record["file"]
    tensors = read_tensors(path, record["sha256"], ("images", "labels"))
    images, labels = tensors["images"], tensors["labels"]
    shape = (record["count"], meta["height"], meta["width"], meta["channels"])
    if tuple(images.shape) != shape:
        raise DataError(f"{path}: images have shape {tuple(images.shape)}, meta.json says {shape}")
    return Images(images.permute(0, 3, 1, 2), labels, tuple(meta["classes"]), origin=str(path))


def load_encoded(config: Config) -> Packed | None:
    """The image files of the training split, in the order of `load_split`, or None if they were not kept."""
    from mwpb_fast.data.decode import Packed

    if hasattr(find_set(config.name), "images"):
        return None
    folder = _folder(config.dir, config.name)
    record = _meta(folder, config.name)["splits"]["train"]
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


def _folder(dir: Path | str, name: str) -> Path:
    return Path(dir) / name.rsplit(".", 1)[-1]


def _meta(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.is_file():
        raise DataError(f"{path}: missing; run `mwpb-fast data prepare {name}` first")
    try:
        meta = json.loads(path.read_bytes())
        complete = meta["format"] == FORMAT and all(
            meta[key] for key in ("classes", "height", "width", "channels")
        )
        complete = complete and all(
            meta["splits"][split][key] for split in _SPLITS for key in ("file", "count", "sha256")
        )
    except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError):
        complete = False
    if not complete:
        raise DataError(
            f"{path}: damaged or of another version; remove it and run `mwpb-fast data prepare {name}`"
        )
    return meta


def _locate(
    module: ModuleType, name: str, source: Path | None, dir: Path, offline: bool, progress: Progress | None
) -> tuple[Path, dict[str, Any]]:
    """The path to open, and where it came from."""
    from mwpb_fast.data.download import fetch, sha256_of

    alternatives = getattr(module, "ARCHIVES", {}).get(name, ())
    hashes = {item.sha256 for files in alternatives for item in files}
    if source is not None:
        source = Path(source)
        if not source.exists():
            raise DataError(f"{source}: does not exist")
        archives = [source / files[0].filename for files in alternatives if len(files) == 1]
        path = next((archive for archive in archives if source.is_dir() and archive.is_file()), source)
        digest = sha256_of(path) if path.is_file() else None
        return path, {"path": str(path), "sha256": digest, "official": digest in hashes}
    if not alternatives:
        raise DataError(f"{name} is not downloaded: give its folder or archive with --data-dir")
    folder = dir / "downloads"
    if offline:
        names = " or ".join(" and ".join(item.filename for item in files) for files in alternatives)
        raise DataError(f"{name} is not in {_folder(dir, name)} and offline is set: give {names} with --data-dir")
    problems = []
    for files in alternatives:
        try:
            paths = [fetch(item, folder, progress) for item in files]
        except DataError as error:
            problems.append(str(error))
            continue
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror or error}") from error
        return (paths[0] if len(paths) == 1 else folder), {
            "path": ", ".join(map(str, paths)),
            "sha256": [item.sha256 for item in files],
            "official": True,
        }
    raise DataError("; ".join(problems))


def _write(target: Path, name: str, raw: RawSet, origin: dict[str, Any], keep: bool) -> dict[str, Any]:
    import numpy as np

    from mwpb_fast.data.decode import Encoded, count_channels, decode, pack

    splits = {"train": raw.train, "test": raw.test}
    if keep and not isinstance(raw.train, Encoded):
        raise DataError(f"{raw.origin}: holds arrays, not image files; nothing to keep encoded")
    for split, data in splits.items():
        counts = np.bincount(data.labels, minlength=len(raw.classes))
        if not counts.all():
            raise DataError(
                f"{raw.origin}: class {raw.classes[int(counts.argmin())]} has no images in the {split} split"
            )
    channels = raw.channels
    if not channels:
        channels = max(
            count_channels(data) if isinstance(data, Encoded) else data.images.shape[3] for data in splits.values()
        )
    meta: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "classes": list(raw.classes),
        "splits": {},
        "source": origin,
    }
    size = raw.size
    try:
        target.mkdir(parents=True, exist_ok=True)
        for split, data in splits.items():
            images = decode(data, channels, size) if isinstance(data, Encoded) else data.images
            size = (images.shape[2], images.shape[1])
            meta.update(height=size[1], width=size[0], channels=int(images.shape[3]))
            record = save_arrays(target / f"{split}.safetensors", {"images": images, "labels": data.labels})
            meta["splits"][split] = {"count": len(images), **record}
        if keep and isinstance(raw.train, Encoded):
            packed = pack(raw.train)
            arrays = {"bytes": packed.data, "offsets": packed.offsets, "labels": raw.train.labels}
            meta["splits"]["train"]["encoded"] = save_arrays(target / "train.encoded.safetensors", arrays)
        write_whole(target / "meta.json", json.dumps(meta, indent=1).encode())
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror or error}") from error
    return meta
