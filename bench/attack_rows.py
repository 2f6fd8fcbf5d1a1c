"""The rows of bench/attack.py: times in turn as ratios, rates and shares, and what is said of them."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from ceilings import arithmetic
from measure import ratios
from rounds import Rounds

REFERENCE = "mwpb eager fp32"
KINDS = {"as used": "as used", "tuned by their user": "autocast"}
COLUMNS = (
    ("name", "attack", ""),
    ("arithmetic", "convolutions in", ""),
    ("slower", "times the first's time", ".2f"),
    ("ms", "ms per image and step", ".3f"),
    ("gflops", "GFLOP/s", ",.0f"),
    ("share", "share of the matrix rate", ".0%"),
    ("loss_ratio", "loss after the attack, against eager float32", ".4f"),
)


def table(
    o: argparse.Namespace, times: dict[str, list[float]], rounds: Rounds, losses: dict[str, float], flop: float
) -> list[dict[str, Any]]:
    """Rows by name, ratios first: to the first contestant's time (the bf16 twin's, where it runs) in the same
    round."""
    base = next(iter(times))
    rows = []
    for name, taken in times.items():
        low = "bf16" in name or "autocast" in name
        kind = arithmetic(torch.bfloat16 if low else torch.float32, o.device)
        slower = ratios(taken, times[base])
        share = rounds.shares(kind, flop, taken)
        rows.append(
            {
                "name": name,
                "arithmetic": kind,
                "slower": slower["median"],
                "ms": statistics.median(taken) / o.batch / o.steps * 1e3,
                "gflops": flop / statistics.median(taken) / 1e9,
                "share": share["median"],
                "loss": losses[name],
                "loss_ratio": losses[name] / losses[REFERENCE] if REFERENCE in losses else None,
                "slower_spread": slower,
                "share_spread": share,
                "seconds": taken,
            }
        )
    return rows


def say(row: dict[str, Any]) -> None:
    slower = row["slower_spread"]
    print(
        f"{row['name']:48s} {row['slower']:6.2f}x ({slower['min']:.2f} to {slower['max']:.2f})  "
        f"{row['ms']:8.3f} ms {row['gflops']:8.0f} GFLOP/s  {row['share']:5.0%} of the product's in "
        f"{row['arithmetic']}"
    )


def fastest(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For peers as used, and for peers as their users may tune them: the fastest, and how many times the first
    contestant's time it takes."""
    found = {}
    for kind, word in KINDS.items():
        peers = [row for row in rows if word in row["name"]]
        if peers:
            row = min(peers, key=lambda row: row["slower"])
            found[kind] = {"name": row["name"], "slower": row["slower_spread"]}
    return found
