"""What a model's file may say of the class that the field loads the same weights into."""

from __future__ import annotations

from typing import NamedTuple


class Counterpart(NamedTuple):
    """RobustBench's class of the same names and the same function; `robustbench(...)` of a model's file gives it.

    module: of its model_zoo.architectures. arguments: of the class, where {num_classes} stands for their number.
    statistics: the names of the mean and deviation of images that it always has, (channels, 1, 1) each.
    """

    module: str
    name: str
    arguments: str
    statistics: tuple[str, str] | None = None
