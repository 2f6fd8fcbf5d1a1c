"""Table 1 on real images, killed half way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mwpb_fast import data

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_table_1_on_real_images_killed_half_way(shared_data: Path, tmp_path: Path) -> None:
    """reproduce table1 --subset 2000 --epochs 4 with the small model: killed, gone on, rendered."""
    data.prepare("cifar10", source=shared_data / "cifar10-jpeg.tar.xz", dir=tmp_path / "data")
    script = [
        sys.executable, "-m", "mwpb_fast", "reproduce", "table1", "--subset", "2000", "--epochs", "4",
        "--model", "smallresnet-16", "--seeds", "1", "--test-subset", "100", "--attacks", "natural,pgd20,cw20,aa",
        "--long-subset", "20", "--last", "cheap",
        "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(script, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:  # in the middle of the fifth of nine runs
            text = log.read_text()
            if "[5/9]" in text and "epoch   2/4" in text.partition("[5/9]")[2]:
                break
            time.sleep(0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr
    assert "4 done" in done.stdout
    assert "after epoch 2 of 4" in done.stdout
    assert "resuming from last-00003-0000000.pt" in done.stdout
    table = json.loads((tmp_path / "out" / "table1" / "table.json").read_text())
    assert [run["state"] for row in table["rows"] for run in row["runs"]] == ["done"] * 9
    for row in table["rows"]:
        for key in ("natural", "pgd", "cw", "aa"):
            assert row["cells"][key]["best"]["n"] == 1
            if row["control"]:
                assert row["cells"][key]["best"]["control"]["n"] == 1
        assert row["cells"]["pgd"]["best"]["mean"] <= row["cells"]["natural"]["best"]["mean"]
    assert table["rows"][0]["cells"]["natural"]["best"]["mean"] > 15  # AT is above chance
    text = (tmp_path / "out" / "table1" / "table.md").read_text()
    assert "9 of 9 runs are complete." in text
    assert "**Reduced setting:**" in text
