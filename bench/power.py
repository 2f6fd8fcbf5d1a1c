"""How large a difference between two rows `mwpb-fast reproduce` would find, before it is run.

    python bench/power.py bench/results/small/table.json --seeds 3 5 10

takes the spread over the seeds that a table of earlier runs has measured, and gives for each attack the
difference, in points, that a paired t-test of so many seeds calls significant at 5 % with a probability of 80 %.
What cannot be known before lies between two spreads: that of the differences between a row and its control seed by
seed, which is too small where the two have trained nearly alike; and that of two rows that have nothing but their
spread in common, the root of two times the row's own. More test images make both rather smaller.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def detectable(std: float, seeds: int, level: float = 0.05, power: float = 0.8) -> float:
    """The difference that a two-sided paired t-test of so many seeds finds with that probability, where the paired
    differences have the standard deviation `std`; from the noncentral t-distribution. seeds: at least 2."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    critical = t.ppf(1 - level / 2, seeds - 1)
    shift = brentq(lambda d: nct.sf(critical, seeds - 1, d) - power, 0.0, 100.0)
    return float(shift) * std / math.sqrt(seeds)


def lines(result: dict[str, Any], seeds: Sequence[int]) -> Iterator[str]:
    """For each attack and each row with a control the two spreads, and what can be found with them."""
    header = " ".join(f"{f'{n} seeds':>10s}" for n in seeds)
    yield f"{'attack':12s} {'row':12s} {'spread of':28s} {'points':>8s} {header}"
    for column in result["columns"]:
        for row in result["rows"]:
            part = row["cells"][column["key"]]["best"]
            if part["control"]["std"] is None:
                continue
            for kind, std in (
                ("differences, seed by seed", part["control"]["std"]),
                ("rows without a common seed", math.sqrt(2) * part["std"]),
            ):
                found = " ".join(f"{detectable(std, n):10.2f}" for n in seeds)
                yield f"{column['label']:12s} {row['label']:12s} {kind:28s} {std:8.2f} {found}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="TABLE.json", help="of `mwpb-fast reproduce`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10], help="runs of each row")
    given = parser.parse_args(arguments)
    if min(given.seeds) < 2:
        parser.error("--seeds must be at least 2")
    try:
        result = json.loads(given.result.read_bytes())
    except (OSError, ValueError) as error:
        parser.error(f"{given.result}: {error}")
    print("\n".join(lines(result, given.seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
