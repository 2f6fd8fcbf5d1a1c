"""SVHN, cropped digits: train_32x32.mat and test_32x32.mat, in which label 10 is the digit 0.

Source: Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from mwpb_fast.data.dataset import DataError
from mwpb_fast.data.decode import Arrays, RawSet
from mwpb_fast.data.download import Download
from mwpb_fast.data.tree import Tree
from mwpb_fast.system.optional import attempt

NAMES = ("svhn",)
_BASE = "http://ufldl.stanford.edu/housenumbers/"
ARCHIVES = {
    "svhn": (
        (
            Download(
                "train_32x32.mat",
                (_BASE + "train_32x32.mat",),
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
                182_040_794,
            ),
            Download(
                "test_32x32.mat",
                (_BASE + "test_32x32.mat",),
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
                64_275_384,
            ),
        ),
    )
}
_MOST = 1_000_000  # images in a split; the files' own extra split has 531,131


def read(tree: Tree, name: str) -> RawSet:
    """The set in `tree`, from its two .mat files."""
    return RawSet(
        tuple(str(digit) for digit in range(10)), _split(tree, "train"), _split(tree, "test"), str(tree.path)
    )


def _split(tree: Tree, split: str) -> Arrays:
    scipy: Any = attempt("scipy.io")
    if scipy.module is None:
        raise DataError(f"svhn: needs SciPy, which {scipy.why}: {scipy.cure('scipy')}")
    loadmat, whosmat = scipy.module.loadmat, scipy.module.whosmat
    member = tree.find(f"{split}_32x32.mat")
    if member is None:
        raise DataError(f"{tree.path}: has no {split}_32x32.mat")
    file, content = tree.label(member), tree.read(member)
    try:
        shapes = {variable: tuple(shape) for variable, shape, _ in whosmat(io.BytesIO(content))}
        x, y = shapes.get("X", ()), shapes.get("y", ())
        if len(x) != 4 or x[:3] != (32, 32, 3) or not 0 < x[3] <= _MOST or y not in ((x[3], 1), (1, x[3])):
            raise DataError(f"{file}: X is {x} and y is {y}, need (32, 32, 3, N) and (N, 1)")
        found = loadmat(io.BytesIO(content), variable_names=["X", "y"])
        pixels, labels = found["X"], found["y"].reshape(-1)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # scipy lets parser errors of every kind through
        raise DataError(f"{file}: truncated or not a MATLAB file ({' '.join(str(error).split())})") from error
    if pixels.dtype != np.uint8:
        raise DataError(f"{file}: X holds {pixels.dtype}, need uint8")
    if labels.dtype.kind not in "iuf" or (labels != np.floor(labels)).any():
        odd = labels[labels != np.floor(labels)][0] if labels.dtype.kind == "f" else f"of type {labels.dtype}"
        raise DataError(f"{file}: label {odd} is no whole number")
    if labels.min() < 1 or labels.max() > 10:
        raise DataError(
            f"{file}: label {labels.min() if labels.min() < 1 else labels.max()} is out of range 1 to 10"
        )
    return Arrays(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10)
