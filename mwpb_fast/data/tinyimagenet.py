"""Tiny-ImageNet-200 in its original layout, as a folder, zip or tar; also with only some of its classes.

The original's test images have no labels, so its labelled validation split serves as the test split. Classes
are numbered in the sorted order of their ids. Source: Le and Yang, "Tiny ImageNet", CS231N, 2015.
"""

from __future__ import annotations

import numpy as np

from mwpb_fast.data.archive import Tree
from mwpb_fast.data.dataset import DataError
from mwpb_fast.data.decode import SUFFIXES, Encoded, RawSet
from mwpb_fast.data.download import Download

NAMES = ("tinyimagenet",)
ARCHIVES = {
    "tinyimagenet": (
        (
            Download(
                "tiny-imagenet-200.zip",
                (
                    "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
                    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                ),
                "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
                248_100_043,
            ),
        ),
    )
}
SIZE = (64, 64)


def read(tree: Tree, name: str) -> RawSet:
    """The set in `tree`: the classes that both wnids.txt (where there is one) and train/ have."""
    root = tree.root_of("train")
    if root is None:
        raise DataError(f"{tree.path}: has no train/<id>/images/ folders; not Tiny-ImageNet")
    images: dict[str, list[str]] = {}
    for member in tree.names:
        parts = member[len(root) :].split("/") if member.startswith(f"{root}train/") else []
        if len(parts) == 4 and parts[2] == "images":
            if not parts[3].lower().endswith(SUFFIXES):
                raise DataError(f"{tree.label(member)}: not an image file")
            images.setdefault(parts[1], []).append(member)
    classes = tuple(sorted(set(images) & set(_ids(tree, root, images))))
    if not classes:
        raise DataError(f"{tree.path}: none of the classes in wnids.txt has a folder train/<id>/images/")
    for group in classes:
        _check_boxes(tree, f"{root}train/{group}/", group, images[group])
    train = [(member, label) for label, group in enumerate(classes) for member in images[group]]
    test = _validation(tree, root, classes)
    return RawSet(classes, _encoded(tree, train), _encoded(tree, test), str(tree.path), size=SIZE)


def _ids(tree: Tree, root: str, images: dict[str, list[str]]) -> list[str]:
    return _text(tree, f"{root}wnids.txt").split() if f"{root}wnids.txt" in tree.names else list(images)


def _text(tree: Tree, member: str) -> str:
    try:
        return bytes(tree.read(member)).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{tree.label(member)}: not a text file") from error


def _check_boxes(tree: Tree, folder: str, group: str, members: list[str]) -> None:
    """The boxes file lists the class's images, which shows whether any is missing."""
    listing = f"{folder}{group}_boxes.txt"
    if listing in tree.names:
        present = {member.rsplit("/", 1)[-1] for member in members}
        for line in _text(tree, listing).splitlines():
            if line and line.split("\t")[0] not in present:
                raise DataError(
                    f"{tree.label(folder)}images/{line.split(chr(9))[0]}: missing, but {listing} lists it"
                )


def _validation(tree: Tree, root: str, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    listing = f"{root}val/val_annotations.txt"
    if listing not in tree.names:
        raise DataError(f"{tree.label(listing)}: missing")
    known, found = set(tree.names), []
    for number, line in enumerate(_text(tree, listing).splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise DataError(f"{tree.label(listing)}: line {number} is not file<TAB>class")
        if fields[1] in classes:
            member = f"{root}val/images/{fields[0]}"
            if member not in known:
                raise DataError(f"{tree.label(member)}: missing, but val_annotations.txt lists it")
            found.append((member, classes.index(fields[1])))
    return found


def _encoded(tree: Tree, members: list[tuple[str, int]]) -> Encoded:
    labels = np.array([label for _, label in members], dtype=np.int64)
    return Encoded(
        [tree.label(member) for member, _ in members], [tree.read(member) for member, _ in members], labels
    )
