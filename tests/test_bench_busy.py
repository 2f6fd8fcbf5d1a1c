"""bench/busy.py: who is timed beside what, and what is written."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_contestant_beside_every_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("busy")
    rates = iter([10.0, 20.0, 40.0, 30.0, 12.0, 20.0, 44.0, 30.0])
    seen = []

    def images_per_second(settings: dict[str, str], epochs: int) -> float:
        seen.append(settings)
        return next(rates)

    monkeypatch.setattr(bench, "images_per_second", images_per_second)
    monkeypatch.setattr(sys, "argv", ["bench/busy.py"])
    bench.main(["--loads", "0", "--rounds", "2", "--json", str(tmp_path / "busy.json")])
    rows = json.loads((tmp_path / "busy.json").read_text())["rows"]
    assert seen == [*bench.CONTESTANTS.values()] * 2
    assert [row["median"] for row in rows] == [11.0, 20.0, 42.0, 30.0]
    assert rows[0]["share"] == 11 / 42
    assert [row["name"] for row in rows] == list(bench.CONTESTANTS)


def test_busy_programs_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("busy")
    started = []
    real = bench.subprocess.Popen

    def start(command: list[str]) -> object:
        started.append(real(command))
        return started[-1]

    monkeypatch.setattr(bench.subprocess, "Popen", start)
    with bench.busy(2):
        assert all(os.getpgid(process.pid) for process in started)
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
