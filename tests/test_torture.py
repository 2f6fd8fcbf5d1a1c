"""A quick share of `make torture`, and its result file, which is gone on with and says what was not run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Bench = Callable[[str], Any]


@pytest.mark.parametrize(("part", "tries"), [("checkpoints", 12), ("shards", 4), ("prepared", 15)])
def test_damage_in_every_region_is_noticed(part: str, tries: int, bench: Bench, tmp_path: Path) -> None:
    count = getattr(bench("torture_files"), part)(tries, tmp_path)
    assert count.cases >= tries
    assert not count.failures


def test_a_disk_that_fails_at_any_write(bench: Bench, tmp_path: Path) -> None:
    count = bench("torture_files").failing_disk(4, tmp_path)
    assert count.cases == 4
    assert not count.failures


def test_damage_is_never_none(bench: Bench, tmp_path: Path) -> None:
    files, path = bench("torture_files"), tmp_path / "file"
    good = b"\0" * 100
    path.write_bytes(good)
    seen = [(path.read_bytes(), kind, at) for kind, at in files.damages(path, 20)]
    assert path.read_bytes() == good
    assert all(content != good for content, *_ in seen)
    assert {kind for _, kind, _ in seen} == set(files.KINDS)
    assert all(number * 5 <= at < number * 5 + 5 for number, (*_, at) in enumerate(seen))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["training", "validation", "writing"])
def test_kills(phase: str, bench: Bench, tmp_path: Path) -> None:
    bench("torture_child").prepare_server()
    kills = bench("torture_kills")
    count = kills.killed(kills.training(), phase, 3, tmp_path)
    assert count.cases == 3
    assert not count.failures


def test_the_result_file_is_gone_on_with_and_names_what_was_not_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torture, calls = bench("torture"), list[str]()
    about = {
        "device": "d",
        "versions": "v",
        "commit": "c",
        "command": "python bench/torture.py",
        "date": "2030-01-02",
    }
    monkeypatch.setattr(torture, "circumstances", lambda device: about)
    monkeypatch.setattr(torture, "leave_at_sigterm", lambda: None)
    monkeypatch.setattr(torture, "prepare_server", lambda: None)
    monkeypatch.chdir(tmp_path)

    def part(name: str, promise: str, *failures: str, error: str = "") -> Any:
        def work(folder: Path) -> Any:
            calls.append(name)
            if error:
                raise FileNotFoundError(error)
            return torture.Count(1200, list(failures), "said")

        return torture.Part(name, promise, f"by {name[0]}", work)

    every = [
        part("a", "one"),
        part("b:x", "two", "it\nbroke"),
        part("b:y", "two", error="no file"),
        part("c", "two"),
    ]
    monkeypatch.setattr(torture, "parts", lambda: every)
    path = tmp_path / "t.json"
    for words, status in ((["--parts", "a"], 0), (["--parts", "b:y", "a"], 1), (["--parts", "b"], 1)):
        monkeypatch.setattr("sys.argv", ["torture.py", f"--json={path}", *words])
        assert torture.main() == status
    assert calls == ["a", "b:y", "b:x"]
    out = capsys.readouterr().out
    assert "going on with b:x" in out
    assert "\nb:y: not run: no file\n" in out
    content = json.loads(path.read_bytes())
    assert content["unfinished"] == ["c"]
    rows = [[row[key] for key in ("promise", "cases", "failures", "notes")] for row in content["rows"]]
    assert rows == [
        ["one", 1200, 0, "said"],
        ["two", 1200, 1, "said; not run: no file; it broke"],
        ["", None, None, "not run"],
        ["all of it", 2400, 1, ""],
    ]
    about["commit"] = "d"
    monkeypatch.setattr("sys.argv", ["torture.py", f"--json={path}", "--parts", "a", "b:x", "--keep"])
    assert torture.main() == 1
    assert calls[3:] == ["b:x"]  # what failed is tried again
    first, second, *_ = json.loads(path.read_bytes())["rows"]
    assert first["notes"] == "said; at commit c"
    assert second["notes"] == "said; not run: 1 of 2 parts; it broke"
    monkeypatch.setattr("sys.argv", ["torture.py", f"--json={path}", "--parts", "a"])
    assert torture.main() == 1
    assert calls[4:] == ["a"]


def test_the_processors_time_is_that_of_all_processes(bench: Bench) -> None:
    spin = "import time\nwhile time.process_time() < 0.2: pass"
    before = bench("torture_child").processor_seconds()
    subprocess.run([sys.executable, "-c", spin], check=True)
    with subprocess.Popen([sys.executable, "-c", f"{spin}\nprint(1, flush=True)\ninput()"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout is not None
        other.stdout.readline()
        assert bench("torture_child").processor_seconds() - before > 0.35
        other.kill()


def test_the_parts_are_of_this_checkout(bench: Bench) -> None:
    """Each has its own name, and those of the test suite name files that are there, or are to come."""
    parts = bench("torture").parts()
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert {name.partition(":")[0] for name in names} >= {"kills", "signals", "damage", "disk", "hostile", "fuzz"}
    assert all(part.promise and part.tried for part in parts)
