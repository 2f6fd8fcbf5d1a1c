"""What is kept of every step of an epoch: a row of numbers, on the device until somebody asks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch


class Trace(NamedTuple):
    """The columns, (steps,) float32 each: loss; smallest, mean and largest radius; whether all was finite; the
    gradient's norm; the radius below which 5, 25, 50, 75 and 95 % of the batch lie. A later version adds its own
    at the end."""

    loss: torch.Tensor
    radius_min: torch.Tensor
    radius_mean: torch.Tensor
    radius_max: torch.Tensor
    finite: torch.Tensor
    norm: torch.Tensor
    radius_p05: torch.Tensor
    radius_p25: torch.Tensor
    radius_p50: torch.Tensor
    radius_p75: torch.Tensor
    radius_p95: torch.Tensor


COLUMNS = len(Trace._fields)
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
QUANTILES = [name for name in Trace._fields if name.startswith("radius_p")]


def row(loss: torch.Tensor, radius: torch.Tensor, finite: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """A step's row, (COLUMNS,). loss, finite, norm: scalars. radius: (B,)."""
    ranked = radius.sort().values
    quantiles = [ranked[round(share * (len(ranked) - 1))] for share in SHARES]
    extent = radius.min(), radius.mean(), radius.max()
    return torch.stack(Trace(loss.float(), *extent, finite.float(), norm.float(), *quantiles))


def widened(rows: torch.Tensor) -> torch.Tensor:
    """Rows of this version from those of an earlier one, which had fewer columns: NaN where it had no number."""
    return torch.nn.functional.pad(rows, (0, max(0, COLUMNS - rows.shape[1])), value=torch.nan)


def columns(rows: torch.Tensor) -> Trace:
    """rows: (steps, COLUMNS)."""
    return Trace(*rows.unbind(1))


def bad_steps(rows: torch.Tensor) -> list[int]:
    """Which steps were not finite and left the weights alone, counted from 0."""
    return (columns(rows).finite == 0).nonzero().flatten().tolist()


def figures(rows: torch.Tensor, clip_norm: float = 0.0) -> dict[str, Any]:
    """Loss, radii and gradient norms of an epoch, over its good steps. Quantiles are means over the steps of the
    batch's. Norms are over the steps that have one; the share of clipped steps, where they are clipped, too."""
    good = columns(rows[columns(rows).finite > 0])
    norms = good.norm[good.norm.isfinite()]  # with loss scaling a gradient may have overflowed
    clipped = {"clipped": (norms > clip_norm).float().mean().item()} if clip_norm else {}
    return {
        "loss": good.loss.mean().item(),
        "radius_min": good.radius_min.min().item(),
        "radius_mean": good.radius_mean.mean().item(),
        "radius_max": good.radius_max.max().item(),
        **{name: getattr(good, name).nanmean().item() for name in QUANTILES},
        "norm_mean": norms.mean().item(),
        "norm_max": norms.max().item() if len(norms) else math.nan,
        **clipped,
    }
