"""Turns a data set, from wherever it is, into checked files that load at once (see prepared.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwpb_fast.data.dataset import Config, DataError, content_hash
from mwpb_fast.data.fit import Fit
from mwpb_fast.data.identity import KIND, difference, identity
from mwpb_fast.data.prepared import (
    FORMAT,
    SPLITS,
    find_set,
    known_sets,
    load_encoded,
    load_split,
    read_meta,
    set_folder,
    split_name,
)
from mwpb_fast.data.store import staging, write_error

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np

    from mwpb_fast.data.decode import RawSet
    from mwpb_fast.data.download import Progress

    Tell = Callable[[str], None]

__all__ = ["find_set", "known_sets", "load_encoded", "load_split", "prepare", "set_folder"]


def prepare(
    name: str,
    *,
    source: Path | None = None,
    dir: Path = Path("data"),
    encoded: bool = False,
    offline: bool = False,
    fit: Fit | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Prepare a set into a folder of `dir` and return its description (the content of meta.json).

    source: the set's archive or folder, or a folder that holds the archive; without it a prepared set is
    verified and kept, and otherwise the set is downloaded to `<dir>/downloads`, unless `offline`.
    encoded: keep the image files too, for the dali loader to decode. fit: how images are brought to one size.
    replace: put the set in the place of another one that is there, which is refused otherwise. tell: called with
    a line for each thing that the user should know of. Raises DataError, and DataWriteError for what the machine
    cannot do.
    """
    module = find_set(name)
    target = set_folder(dir, name)
    if hasattr(module, "images"):
        splits = {s: module.images(name, s) for s in SPLITS}
        counts = {s: {"count": len(images)} for s, images in splits.items()}
        return {"name": name, "embedded": True, "classes": list(splits["train"].classes), "splits": counts}
    if source is None and not replace and (target / "meta.json").exists():
        meta = read_meta(target, name)
        if not encoded or "encoded" in meta["splits"]["train"]:
            for split in SPLITS:
                load_split(Config(name=name, dir=str(dir)), split)
            return meta
    path, origin = _locate(module, name, source, Path(dir), offline, progress)
    from mwpb_fast.data.archive import open_tree

    with open_tree(path) as tree:
        raw = module.read(tree, split_name(name)[0])
        meta, files = _convert(name, raw, origin, encoded, fit or Fit(), tell)
    if not replace and (target / "meta.json").exists():
        there = _same(name, dir, target, meta)
        if not encoded or "encoded" in there["splits"]["train"]:
            tell(f"{target}: the same images are there already, and are kept")
            return there
    with staging(target) as stage:
        for split in SPLITS:
            meta["splits"][split] |= stage.write(f"{split}.safetensors", files[split])
        if encoded:
            meta["splits"]["train"]["encoded"] = stage.write("train.encoded.safetensors", files["encoded"])
        stage.commit(meta)
    return meta


def _same(name: str, dir: Path, target: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The description of the set that is there. Raises DataError unless its images are those of `meta`."""
    try:
        there = read_meta(target, name)
        have = {split: identity(load_split(Config(name=name, dir=str(dir)), split)) for split in SPLITS}
    except DataError as error:
        cure = "" if "--replace" in str(error) else "; --replace puts this set in its place"
        raise DataError(f"{error}{cure}") from error
    for split in SPLITS:
        record = meta["splits"][split]
        mine = {key: meta[key] for key in KIND} | {"count": record["count"], "sha256": record["content"]}
        if other := difference(have[split], mine):
            raise DataError(
                f"{target} holds another set (its {split} split has {other}); --replace puts this one in its "
                f"place, a name such as {split_name(name)[0]}:NAME keeps both"
            )
    return there


def _locate(
    module: ModuleType, name: str, source: Path | None, dir: Path, offline: bool, progress: Progress | None
) -> tuple[Path, dict[str, Any]]:
    """The path to open, and where it came from."""
    from mwpb_fast.data.download import fetch, sha256_of

    alternatives = getattr(module, "ARCHIVES", {}).get(split_name(name)[0], ())
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
        raise DataError(
            f"{name} is not in {set_folder(dir, name)} and offline is set: give {names} with --data-dir"
        )
    problems = []
    for files in alternatives:
        try:
            paths = [fetch(item, folder, progress) for item in files]
        except DataError as error:
            problems.append(str(error))
            continue
        except OSError as error:
            raise write_error(folder, error) from error
        return (paths[0] if len(paths) == 1 else folder), {
            "path": ", ".join(map(str, paths)),
            "sha256": [item.sha256 for item in files],
            "official": True,
        }
    raise DataError("; ".join(problems))


def _convert(
    name: str, raw: RawSet, origin: dict[str, Any], keep: bool, fit: Fit, tell: Tell
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The description, less what the files' hashes are, and the arrays of each file."""
    import numpy as np

    from mwpb_fast.data.decode import Encoded, count_channels, decode, pack

    splits = {"train": raw.train, "test": raw.test}
    if (keep or fit) and not all(isinstance(data, Encoded) for data in splits.values()):
        raise DataError(
            f"{raw.origin}: holds arrays, not image files; nothing to {'keep encoded' if keep else 'fit'}"
        )
    if keep and fit:
        raise DataError("--encoded keeps image files as they are: it does not go with --resize and --crop")
    notes = [*raw.notes, *_check_classes(raw)]
    channels = raw.channels or max(
        count_channels(data) if isinstance(data, Encoded) else data.images.shape[3] for data in splits.values()
    )
    shape: tuple[int, ...] = ()
    size, files = None if fit else raw.size, {}
    meta: dict[str, Any] = {"format": FORMAT, "name": name, "classes": list(raw.classes), "splits": {}}
    for split, data in splits.items():
        images = decode(data, channels, size, fit, notes.append) if isinstance(data, Encoded) else data.images
        if images.dtype != np.uint8 or images.ndim != 4 or (shape and images.shape[1:] != shape):
            expected = f"uint8 (N, {', '.join(map(str, shape or ('H', 'W', 'C')))})"
            raise DataError(f"{raw.origin}: the {split} images are {images.dtype} {images.shape}, need {expected}")
        shape = images.shape[1:]
        size = (shape[1], shape[0])
        arrays = {"images": np.ascontiguousarray(images), "labels": np.ascontiguousarray(data.labels, np.int64)}
        content = content_hash(arrays["images"], arrays["labels"])
        meta["splits"][split] = {"count": len(images), "content": content}
        files[split] = arrays
    meta |= dict(zip(("height", "width", "channels"), map(int, shape), strict=True))
    meta |= {"source": origin, "notes": notes} | ({"fit": fit.record()} if fit else {})
    if keep and isinstance(raw.train, Encoded):
        packed = pack(raw.train)
        files["encoded"] = {"bytes": packed.data, "offsets": packed.offsets, "labels": raw.train.labels}
    for note in notes:
        tell(" ".join(note.split()))  # a file's name may have a line break in it
    return meta, files


def _check_classes(raw: RawSet) -> list[str]:
    """What to know of the classes. Raises DataError where there is one only, or one without images in a split."""
    import numpy as np

    if len(raw.classes) < 2:
        raise DataError(f"{raw.origin}: has one class, {raw.classes[0]}; there is nothing to tell it from")
    for split, labels in (("train", raw.train.labels), ("test", raw.test.labels)):
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(raw.classes):
            raise DataError(f"{raw.origin}: a label of the {split} split is not in 0 to {len(raw.classes) - 1}")
        counts = np.bincount(labels, minlength=len(raw.classes))
        if not counts.all():
            raise DataError(
                f"{raw.origin}: class {raw.classes[int(counts.argmin())]} has no images in the {split} split"
            )
    folded: dict[str, str] = {}
    notes = [
        f"classes {folded[name.casefold()]} and {name} differ in nothing but case"
        for name in raw.classes
        if folded.setdefault(name.casefold(), name) != name
    ]
    if all(name.isdecimal() for name in raw.classes) and list(raw.classes) != sorted(raw.classes, key=int):
        notes.append(
            f"classes are numbered in the order of their names as text: {', '.join(raw.classes[:4])}, ..."
        )
    return notes
