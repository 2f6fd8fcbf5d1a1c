"""Where the resident loader ends and DALI begins, for each set: reckoned from a result file of loaders.py."""

from __future__ import annotations

from typing import Any

FREE = (16, 80)  # GiB of a device that are free; the resident loader is the default in half of them
COLUMNS = (
    "data",
    "KiB an image",
    "KiB a file",
    *(f"images resident by default, {gib} GiB free" for gib in FREE),
    "images/s, resident",
    "images/s, DALI",
    "images/s that the step takes",
    "DALI's, times the step's",
)


def rows(content: dict[str, Any]) -> list[list[str]]:
    """A row for each set of the file in the order of COLUMNS, with "-" where that was not measured. DALI's rate is
    with decoding where the set's image files were kept, else from pixels; the step's is that with the resident
    loader, less what it waited."""
    found = []
    for name in dict.fromkeys(row["set"] for row in content["rows"]):
        of = {row["loader"]: row for row in content["rows"] if row["set"] == name}
        resident, dali = of.get("resident"), of.get("dali, files", of.get("dali, pixels"))
        if resident is None:
            continue
        size, file = _bytes(resident), resident.get("file_bytes")
        batch = resident.get("batch", content["batch"])
        takes = batch / (resident["step_ms"] / 1e3 * (1 - resident["wait_share"]))
        rate = dali and dali["images_per_second"]
        found.append(
            [
                name,
                f"{size / 1024:.1f}",
                f"{file / 1024:.1f}" if file else "-",
                *(f"{gib * 2**29 // size:,}" for gib in FREE),
                f"{resident['images_per_second']:,.0f}",
                f"{rate:,.0f}" if rate else "-",
                f"{takes:,.0f}",
                f"{rate / takes:,.0f}" if rate else "-",
            ]
        )
    return found


def _bytes(row: dict[str, Any]) -> int:
    """Of one decoded image; files of before hold its height and width alone."""
    height, width = map(int, row["set"].rpartition(", ")[2].split("x"))
    return int(row.get("image_bytes", 3 * height * width))
