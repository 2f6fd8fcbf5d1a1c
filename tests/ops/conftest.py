"""All op tests run with poisoned memory, but for those that cannot afford it and say so by a mark."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> None:
    if "unpoisoned" not in request.keywords:
        request.getfixturevalue("poisoned_memory")
