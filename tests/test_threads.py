"""How OpenMP is set up before PyTorch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mwpb_fast import threads


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".", 1)).write_text(content)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"": {"cpu__max": "150000 100000\n"}}, 1.5),
        ("0::/\n", {"": {"cpu__max": "max 100000\n"}}, None),
        ("0::/a/b\n", {"a/b": {"cpu__max": "max 100000"}, "a": {"cpu__max": "50000 100000"}}, 0.5),
        ("0::/a/b\n", {"a/b": {"cpu__max": "200000 100000"}, "a": {"cpu__max": "400000 100000"}}, 2.0),
        ("0::/not/visible\n", {"": {"cpu__max": "300000 100000"}}, 3.0),  # a container sees its own root
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
            {"cpu/x": {"cpu__cfs_quota_us": "250000\n", "cpu__cfs_period_us": "100000\n"}},
            2.5,
        ),
        ("1:cpu:/x\n", {"cpu/x": {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}}, None),
        ("0::/\n", {"": {"cpu__max": "no numbers"}}, None),
        ("garbage\n", {}, None),
    ],
)
def test_quota(tmp_path: Path, groups: str, files: dict[str, dict[str, str]], quota: float | None) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for folder, content in files.items():
        group(tmp_path / "fs" / folder, **content)
    assert threads.cpu_quota(tmp_path / "cgroup", tmp_path / "fs") == quota


def test_no_control_groups(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path / "absent", tmp_path) is None


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported PyTorch, on a machine with eight processors."""
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "spin_rounds", lambda library: 1234)
    monkeypatch.setattr(threads, "gnu_openmp", lambda: Path("libgomp.so"))


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize(("quota", "count"), [(None, None), (2.5, "2"), (0.3, "1"), (8.0, None), (100.0, None)])
def test_threads_within_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, count: str | None) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    environment: dict[str, str] = {}
    threads.prepare(environment)
    assert environment.get("OMP_NUM_THREADS") == count
    assert environment.get("GOMP_SPINCOUNT") == (None if count == "1" else "1234")
    assert ("quota" in threads.chosen()) == (count is not None)


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_settings_win(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.0)
    environment = {name: "7"}
    threads.prepare(environment)
    assert environment[name] == "7"
    assert f"{name}=7" in threads.chosen()
    assert environment.get("OMP_NUM_THREADS", "7") == ("2" if name in threads._WAITS else "7")
    assert ("GOMP_SPINCOUNT" in environment) == (name != "OMP_WAIT_POLICY")


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("missing", ["gnu_openmp", "spin_rounds"])
def test_what_cannot_be_measured_is_left_alone(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(threads, missing, lambda *_: None)
    environment: dict[str, str] = {}
    threads.prepare(environment)
    assert "GOMP_SPINCOUNT" not in environment
    assert "could not be measured" in threads.chosen()


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_chosen", None)
    environment: dict[str, str] = {}
    threads.prepare(environment)
    assert environment == {}
    assert "imported before" in threads.chosen()


@pytest.mark.usefixtures("unprepared")
def test_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    environment: dict[str, str] = {}
    threads.prepare(environment)
    assert environment == {"OMP_NUM_THREADS": "1"}
    assert "up to 1 thread (" in threads.chosen()


@pytest.mark.skipif(threads.gnu_openmp() is None, reason="this PyTorch has another OpenMP")
@pytest.mark.skipif(threads.available()[0] < 2, reason="a thread that waits needs another one to wait for")
def test_the_spin_is_measured(tmp_path: Path) -> None:
    library = threads.gnu_openmp()
    assert library is not None
    short, long = (threads.spin_rounds(library, seconds) for seconds in (1e-5, 1e-3))
    # a round takes between 1 and 1000 nanoseconds on any processor
    assert short is not None
    assert long is not None
    assert 10 <= short <= 10_000
    assert 1_000 <= long <= 300_000
    assert threads.spin_rounds(tmp_path / "no-library.so") is None


def doctor(**environment: str) -> str:
    """What `doctor` says of OpenMP in a process of its own."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    command = [sys.executable, "-c", "import sys; from mwpb_fast.cli import main; sys.exit(main())"]
    text = subprocess.check_output([*command, "doctor", "--json"], env=plain | environment, text=True)
    return next(f["detail"] for f in json.loads(text)["findings"] if f["name"] == "openmp")


def test_doctor_says_what_was_chosen() -> None:
    assert "up to" in (found := doctor())
    assert ("spin for" in found) == (threads.gnu_openmp() is not None and threads.available()[0] > 1)
    assert "OMP_NUM_THREADS=1" in doctor(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="0")
