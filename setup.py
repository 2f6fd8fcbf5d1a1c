"""The trainer's packages, and what it needs; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
NEEDS = [
    "numpy>=1.26",
    "torch>=2.11",
    "jsonargparse[signatures]>=4.50",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "pillow>=10.1",
    "tensorboard>=2.16.2",  # 2.16.0 and 2.16.1 would bring TensorFlow with them
]


def ops() -> str:
    """The ops of the same version; in a clone without them its own, so that `pip install .` does."""
    found = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    clone, wanted = ROOT / "kernels", f"mwpb-kernels=={found[1]}"
    if "sdist" in sys.argv or not clone.is_dir():
        return wanted
    try:
        return wanted if version("mwpb-kernels") == found[1] else f"mwpb-kernels @ {clone.as_uri()}"
    except PackageNotFoundError:
        return f"mwpb-kernels @ {clone.as_uri()}"


trainer = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("mwpb_fast/**/__init__.py"))
setup(
    packages=[str(folder).replace(os.sep, ".") for folder in trainer],
    package_data={"mwpb_fast": ["py.typed"]},
    install_requires=[ops(), *NEEDS],
)
