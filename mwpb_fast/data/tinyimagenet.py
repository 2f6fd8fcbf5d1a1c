"""Tiny-ImageNet-200, as a folder, zip or tar; also with only some of its classes.

The original's test images have no labels, so its labelled validation split serves as the test split: in its
original layout, or put into val/<id>/, with or without images/ below. Classes are numbered in the sorted order of
their ids. Source: Le and Yang, "Tiny ImageNet", CS231N, 2015.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mwpb_fast.data import folder
from mwpb_fast.data.dataset import DataError
from mwpb_fast.data.decode import SUFFIXES, RawSet
from mwpb_fast.data.download import Download
from mwpb_fast.data.tree import Tree

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
    split = None if root is None else folder.split_folder(tree, root, ("train",))
    if root is None or split is None:
        raise DataError(f"{tree.path}: has no train/<id>/images/ folders; not Tiny-ImageNet")
    images = _images(tree, split)
    listing = f"{root}wnids.txt"
    listed = tree.text(listing).split() if listing in tree.names else list(images)
    classes = tuple(sorted(set(images) & set(listed)))
    if not classes:
        raise DataError(f"{tree.path}: none of the classes in wnids.txt has a folder train/<id>/images/")
    for group in classes:
        _check_boxes(tree, f"{split}{group}/", group, images[group])
    train = [(member, label) for label, group in enumerate(classes) for member in images[group]]
    validation = folder.split_folder(tree, root, ("val",))
    if validation is None:
        raise DataError(f"{tree.label(root + 'val/val_annotations.txt')}: missing")
    test, groups = _validation(tree, validation, classes)
    notes = [*_left_out({"wnids.txt": listed, "train/": images, "val/": groups}, classes)]
    counts = [len(images[group]) for group in classes]
    if min(counts) != max(counts):
        fewest = classes[counts.index(min(counts))]
        notes.append(f"classes have {min(counts)} ({fewest}) to {max(counts)} training images, not equally many")
    return RawSet(
        classes, folder.files(tree, train), folder.files(tree, test), str(tree.path), size=SIZE, notes=tuple(notes)
    )


def _images(tree: Tree, split: str) -> dict[str, list[str]]:
    """The image files of each class, in its folder or in images/ below it. DataError for any other file but the
    lists of boxes, and for a class without images."""
    images: dict[str, list[str]] = {group: [] for group in folder.children(tree, split)}
    for member in tree.names:
        if member.startswith(split):
            group, _, rest = member[len(split) :].partition("/")
            if rest.lower().endswith(SUFFIXES):
                images[group].append(member)
            elif not rest.endswith("_boxes.txt"):
                raise DataError(f"{tree.label(member)}: not an image file")
    for group, members in images.items():
        if not members:
            raise DataError(f"{tree.label(split + group)}: class {group} has no images in this folder")
    return images


def _left_out(found: dict[str, Iterable[str]], classes: tuple[str, ...]) -> Iterator[str]:
    for where, groups in found.items():
        if more := sorted(set(groups) - set(classes)):
            few = ", ".join(more[:5]) + (", ..." if len(more) > 5 else "")
            yield f"{len(more)} classes of {where} are left out: not both of wnids.txt and train/ have {few}"


def _check_boxes(tree: Tree, group_folder: str, group: str, members: list[str]) -> None:
    """The boxes file lists the class's images, which shows whether any is missing."""
    listing = f"{group_folder}{group}_boxes.txt"
    if listing in tree.names:
        present = {member.rsplit("/", 1)[-1] for member in members}
        for line in tree.text(listing).splitlines():
            if line and line.split("\t")[0] not in present:
                raise DataError(
                    f"{tree.label(group_folder)}images/{line.split(chr(9))[0]}: missing, but {listing} lists it"
                )


def _validation(tree: Tree, split: str, classes: tuple[str, ...]) -> tuple[list[tuple[str, int]], set[str]]:
    """The images that val_annotations.txt gives a class; where they were put into a folder for each class, those
    in the folders, of which none that is listed may be missing. Also the ids of all classes that are found."""
    label = {group: number for number, group in enumerate(classes)}
    annotations = f"{split}val_annotations.txt"
    listed = _annotations(tree, annotations) if annotations in tree.names else None
    folders = set(folder.children(tree, split)) - {"images"}
    if listed is None and (not folders or folder.has(tree, f"{split}images/")):
        raise DataError(f"{tree.label(annotations)}: missing")
    listed = listed or []
    groups = {group for _, group in listed}
    if folders and not folder.has(tree, f"{split}images/"):
        return _by_folder(tree, split, label, listed), groups | folders
    known, found = set(tree.names), []
    for file, group in listed:
        if group in label:
            member = f"{split}images/{file}"
            if member not in known:
                raise DataError(f"{tree.label(member)}: missing, but val_annotations.txt lists it")
            found.append((member, label[group]))
    return found, groups


def _by_folder(
    tree: Tree, split: str, label: dict[str, int], listed: list[tuple[str, str]]
) -> list[tuple[str, int]]:
    found, present = [], set()
    for member in tree.names:
        group, _, rest = member.removeprefix(split).partition("/")
        if member.startswith(split) and group in label and rest.lower().endswith(SUFFIXES):
            found.append((member, label[group]))
            present.add((rest.rsplit("/", 1)[-1], group))
    for file, group in listed:
        if group in label and (file, group) not in present:
            raise DataError(f"{tree.label(f'{split}{group}/{file}')}: missing, but val_annotations.txt lists it")
    return found


def _annotations(tree: Tree, listing: str) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(tree.text(listing).splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise DataError(f"{tree.label(listing)}: line {number} is not file<TAB>class")
        rows.append((fields[0], fields[1]))
    return rows
