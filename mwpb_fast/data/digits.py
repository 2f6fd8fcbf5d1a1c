"""scikit-learn's digits, 1,797 handwritten 8x8 digits: embedded in that package, nothing to download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test set).
"""

from __future__ import annotations

from typing import Any

from mwpb_fast.data.dataset import DataError, Images, split_validation
from mwpb_fast.system.lazy import torch
from mwpb_fast.system.optional import attempt

NAMES = ("digits",)
TEST_FRACTION = 0.2


def images(name: str, split: str) -> Images:
    """The train or test split, fixed, stratified, 80 to 20: uint8 (N, 1, 8, 8), 0..16 scaled to 0..255."""
    found: Any = attempt("sklearn.datasets")
    if found.module is None:
        raise DataError(f"{name}: needs scikit-learn, which {found.why}: {found.cure('scikit-learn')}")
    pixels, labels = found.module.load_digits(return_X_y=True)
    scaled = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    target = torch.from_numpy(labels).to(torch.int64)
    train, test = split_validation(target, TEST_FRACTION)
    index = train if split == "train" else test
    return Images(scaled[index], target[index], tuple(str(digit) for digit in range(10)), origin=name)
