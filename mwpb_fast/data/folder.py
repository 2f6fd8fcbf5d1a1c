"""Any folder (or archive) of images per class: train/<class>/*, and test/<class>/* or val/<class>/*.

Classes are numbered in the sorted order of their names. All images must have the same size.
"""

from __future__ import annotations

import numpy as np

from mwpb_fast.data.archive import Tree
from mwpb_fast.data.dataset import DataError
from mwpb_fast.data.decode import SUFFIXES, Encoded, RawSet

NAMES = ("folder",)


def read(tree: Tree, name: str) -> RawSet:
    """The set in `tree`; grayscale if all of its images are."""
    root = tree.root_of("train")
    if root is None:
        raise DataError(f"{tree.path}: has no train/<class>/ folders of images")
    train = by_class(tree, f"{root}train/")
    held_out = next(
        (by_class(tree, f"{root}{name}/") for name in ("test", "val") if has(tree, f"{root}{name}/")), None
    )
    if held_out is None:
        raise DataError(f"{tree.path}: has no test/<class>/ or val/<class>/ folders of images")
    classes = tuple(sorted(train))
    if len(classes) < 2:
        raise DataError(f"{tree.path}: {root}train/ has one class, {classes[0]}; there is nothing to tell apart")
    return RawSet(
        classes, encoded(tree, train, classes), encoded(tree, held_out, classes), str(tree.path), channels=0
    )


def has(tree: Tree, prefix: str) -> bool:
    """Whether a member lies below `prefix`."""
    return any(member.startswith(prefix) for member in tree.names)


def by_class(tree: Tree, prefix: str) -> dict[str, list[str]]:
    """The image files in each folder below `prefix`, by the folder's name; DataError for any other file."""
    groups: dict[str, list[str]] = {}
    for member in tree.names:
        if member.startswith(prefix):
            group, _, rest = member[len(prefix) :].partition("/")
            if not rest or "/" in rest or not rest.lower().endswith(SUFFIXES):
                raise DataError(f"{tree.label(member)}: not an image file in a class folder")
            groups.setdefault(group, []).append(member)
    if not groups:
        raise DataError(f"{tree.path}: {prefix} holds no images")
    return groups


def encoded(tree: Tree, groups: dict[str, list[str]], classes: tuple[str, ...]) -> Encoded:
    """The groups' files with the classes' positions as labels; DataError where the classes differ."""
    for group in sorted(set(groups) ^ set(classes)):
        problem = "is not a class of the training split" if group in groups else "has no images"
        raise DataError(f"{tree.path}: class {group} {problem}")
    members = [(member, label) for label, group in enumerate(classes) for member in groups[group]]
    labels = np.array([label for _, label in members], dtype=np.int64)
    return Encoded(
        [tree.label(member) for member, _ in members], [tree.read(member) for member, _ in members], labels
    )
