"""Any folder (or archive) of images per class: train/<class>/**, and test/<class>/** or val/<class>/**.

The splits' names may also be training, testing, valid and validation, in any case. Classes are numbered in the
sorted order of their names as text; images may lie in folders below their class's.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

from mwpb_fast.data.dataset import DataError
from mwpb_fast.data.decode import SUFFIXES, Encoded, RawSet
from mwpb_fast.data.tree import Tree

NAMES = ("folder",)
TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "val", "valid", "validation")  # the first that is there is the test split


def read(tree: Tree, name: str) -> RawSet:
    """The set in `tree`; grayscale if all of its images are."""
    root = tree.root_of(*TRAIN)
    if root is None:
        raise DataError(f"{tree.path}: has no train/<class>/ folders of images")
    trained, tested = split_folder(tree, root, TRAIN), split_folder(tree, root, HELD_OUT)
    assert trained is not None
    if tested is None:
        raise DataError(f"{tree.path}: has no test/<class>/ or val/<class>/ folders of images")
    train, test = by_class(tree, trained), by_class(tree, tested)
    classes = tuple(sorted(train))
    data = encoded(tree, train, classes), encoded(tree, test, classes)
    notes = (*_unused(tree, root, (trained, tested)), *_nested(tree, (trained, tested)))
    return RawSet(classes, *data, str(tree.path), channels=0, notes=notes)


def split_folder(tree: Tree, root: str, names: Iterable[str]) -> str | None:
    """The folder below `root` that has the first of these names that is there, in any case, as a prefix."""
    for name in names:
        found = [path for path in children(tree, root) if path.lower() == name]
        if len(found) > 1:
            raise DataError(f"{tree.path}: both {root}{found[0]} and {root}{found[1]} are there; which is meant?")
        if found:
            return f"{root}{found[0]}/"
    return None


def children(tree: Tree, prefix: str) -> list[str]:
    """The names of the folders directly below `prefix`."""
    return [
        path[len(prefix) :] for path in tree.folders if path.startswith(prefix) and "/" not in path[len(prefix) :]
    ]


def has(tree: Tree, prefix: str) -> bool:
    """Whether an image lies below `prefix`."""
    return any(name.startswith(prefix) and name.lower().endswith(SUFFIXES) for name in tree.names)


def by_class(tree: Tree, prefix: str) -> dict[str, list[str]]:
    """The image files below each folder in `prefix`, by the folder's name; DataError for any other file, and for
    a folder without images."""
    groups: dict[str, list[str]] = {group: [] for group in children(tree, prefix)}
    for member in tree.names:
        if member.startswith(prefix):
            group, _, rest = member[len(prefix) :].partition("/")
            if not rest or not rest.lower().endswith(SUFFIXES):
                raise DataError(
                    f"{tree.label(member)}: not an image file ({', '.join(SUFFIXES)}) in a class folder; remove it"
                )
            groups[group].append(member)
    if not groups:
        raise DataError(f"{tree.path}: {prefix} holds no images")
    named: dict[str, list[str]] = {}
    for group, members in groups.items():
        if not members:
            raise DataError(f"{tree.label(prefix + group)}: class {group} has no images in this folder")
        # a Mac decomposes accents where others do not; a class has one name
        if named.setdefault(unicodedata.normalize("NFC", group), members) is not members:
            raise DataError(f"{tree.label(prefix + group)}: two folders have this name, in two forms of Unicode")
    return named


def encoded(tree: Tree, groups: dict[str, list[str]], classes: tuple[str, ...]) -> Encoded:
    """The groups' files with the classes' positions as labels; DataError where the classes differ."""
    for group in sorted(set(groups) ^ set(classes)):
        problem = "is not a class of the training split" if group in groups else "has no images"
        raise DataError(f"{tree.path}: class {group} {problem}")
    members = [(member, label) for label, group in enumerate(classes) for member in groups[group]]
    return files(tree, members)


def files(tree: Tree, members: list[tuple[str, int]]) -> Encoded:
    """The members' content, each with its label."""
    labels = np.array([label for _, label in members], dtype=np.int64)
    return Encoded(
        [tree.label(member) for member, _ in members], [tree.read(member) for member, _ in members], labels
    )


def _unused(tree: Tree, root: str, used: tuple[str, ...]) -> Iterator[str]:
    for name in children(tree, root):
        if f"{root}{name}/" not in used and has(tree, f"{root}{name}/"):
            yield f"{root}{name}/ holds images that are not used: the test split is {used[1]}"
    hidden = [name for name in tree.hidden if name.startswith(used) and name.lower().endswith(SUFFIXES)]
    if hidden:
        yield f"{len(hidden)} hidden images are not used (the first: {tree.label(hidden[0])})"


def _nested(tree: Tree, used: tuple[str, ...]) -> Iterator[str]:
    deep = [n for n in tree.names for prefix in used if n.startswith(prefix) and n[len(prefix) :].count("/") > 1]
    if deep:
        yield (
            f"{len(deep)} images in folders below their class's folder are of that class (the first: "
            f"{tree.label(deep[0])})"
        )
