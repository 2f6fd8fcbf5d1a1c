"""What is kept of every step of an epoch: a row of numbers, on the device until somebody asks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Trace(NamedTuple):
    """The columns, (steps,) float32 each: loss; smallest, mean and largest radius; whether all was finite."""

    loss: torch.Tensor
    radius_min: torch.Tensor
    radius_mean: torch.Tensor
    radius_max: torch.Tensor
    finite: torch.Tensor


COLUMNS = len(Trace._fields)


def row(loss: torch.Tensor, radius: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """A step's row, (COLUMNS,). loss, finite: scalars. radius: (B,)."""
    return torch.stack(Trace(loss.float(), radius.min(), radius.mean(), radius.max(), finite.float()))


def columns(rows: torch.Tensor) -> Trace:
    """rows: (steps, COLUMNS)."""
    return Trace(*rows.unbind(1))


def bad_steps(rows: torch.Tensor) -> list[int]:
    """Which steps were not finite and left the weights alone, counted from 0."""
    return (columns(rows).finite == 0).nonzero().flatten().tolist()


def figures(rows: torch.Tensor) -> dict[str, Any]:
    """Loss and radii of an epoch, over its good steps."""
    good = columns(rows[columns(rows).finite > 0])
    return {
        "loss": good.loss.mean().item(),
        "radius_min": good.radius_min.min().item(),
        "radius_mean": good.radius_mean.mean().item(),
        "radius_max": good.radius_max.max().item(),
    }
