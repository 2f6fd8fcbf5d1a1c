"""Airplane, automobile, bird and cat of CIFAR-10: a task that a small network comes to be sure of on a CPU."""

from __future__ import annotations

import dataclasses

import numpy as np

from mwpb_fast.data import cifar
from mwpb_fast.data.decode import Arrays, Encoded, RawSet
from mwpb_fast.data.tree import Tree

NAMES = ("cifar4",)
ARCHIVES = {"cifar4": cifar.ARCHIVES["cifar10"]}
CLASSES = 4


def read(tree: Tree, name: str) -> RawSet:
    """The first four classes of the CIFAR-10 in `tree`; DataError unless that is whole."""
    raw = cifar.read(tree, "cifar10")
    classes = raw.classes[:CLASSES]
    return dataclasses.replace(raw, classes=classes, train=_first(raw.train), test=_first(raw.test))


def _first(data: Arrays | Encoded) -> Arrays | Encoded:
    kept = data.labels < CLASSES
    if isinstance(data, Arrays):
        return Arrays(data.images[kept], data.labels[kept])
    chosen = [int(i) for i in np.flatnonzero(kept)]
    return Encoded([data.names[i] for i in chosen], [data.contents[i] for i in chosen], data.labels[kept])
