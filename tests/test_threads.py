"""How OpenMP is set up before PyTorch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mwpb_fast.system import threads


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
    monkeypatch.setattr(threads, "_limit", "")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "processors", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize(("quota", "count"), [(None, None), (2.5, "2"), (0.3, "1"), (8.0, None), (100.0, None)])
def test_threads_within_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, count: str | None) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    environment: dict[str, str] = {}
    threads.prepare(environment)
    assert environment == ({} if count is None else {"OMP_NUM_THREADS": count})
    assert ("quota" in threads.chosen()) == (count is not None)


@pytest.mark.usefixtures("unprepared")
def test_threads_within_the_processor_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "processors", lambda: 3)
    environment: dict[str, str] = {}
    threads.prepare(environment)
    assert environment == {"OMP_NUM_THREADS": "3"}
    assert threads.chosen().startswith("up to 3 threads (")


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_number_of_threads_wins(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.0)
    environment = {name: "7"}
    threads.prepare(environment)
    assert environment == {name: "7"}
    assert f"{name}=7" in threads.chosen()


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "processors", lambda: 1)
    environment: dict[str, str] = {}
    threads.prepare(environment)
    assert environment == {}


def test_waited_is_summed_over_the_threads(tmp_path: Path) -> None:
    for number, content in enumerate(["1 500000000 3", "9 250000000 1", "", "no numbers here"]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "schedstat").write_text(content)
    (tmp_path / "ended").mkdir()
    assert threads.waited(tmp_path) == 0.75
    assert threads.waited(tmp_path / "absent") is None


class Switch:
    on = False

    def begin(self) -> None:
        self.on = True

    def end(self) -> None:
        self.on = False


def test_threads_sleep_under_contention_and_spin_again_after_it() -> None:
    watch = threads.Watch(Switch())  # type: ignore[arg-type]
    # what lies between the bounds changes nothing, and one calm look is not enough
    shares = [0.0, 0.05, 0.5, 0.05, 0.01, 0.2, 0.0, 0.0, 0.05, 1.5]
    seen = []
    for share in shares:
        watch.look(share)
        seen.append(watch.sleep.on)
    assert seen == [False, False, True, True, True, True, True, False, False, True]


# The processor time of a thread that waits for one which sleeps, in a team of two: what it spins.
WAITING = """
import ctypes, os, time
from mwpb_fast.system import threads
import torch
library = ctypes.CDLL(str(threads.gnu_openmp()), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
sleep = threads.Sleep(library)
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def work(_):
    if library.omp_get_thread_num():
        time.sleep(0.05)
def spun():
    times = []
    for _ in range(6):
        start = time.thread_time()
        library.GOMP_parallel(work, None, 2, 0)
        times.append(time.thread_time() - start)
    return min(times[1:])
found = [spun()]
for switch in (sleep.begin, sleep.end):
    switch()
    time.sleep(0.1)
    found.append(spun())
    print(sleep.on)
print(found[0] / found[1], found[2] / found[1])
"""
needs_two = pytest.mark.skipif(
    threads.gnu_openmp() is None or threads.processors() < 2, reason="needs GNU's OpenMP and two processors"
)


def child(code: str, *words: str, **environment: str) -> str:
    """What a process of its own prints, in which nothing is said to OpenMP but `environment`."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_", "KMP_"))}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", code, *words]
    return subprocess.check_output(command, env=plain | {"PYTHONPATH": path} | environment, text=True)


@needs_two
def test_sleep_ends_the_spin() -> None:
    begun, ended, ratios = child(WAITING).splitlines()
    assert (begun, ended) == ("True", "False")
    # 300,000 rounds against 100: what is measured of the latter is the call itself
    assert all(float(ratio) > 4 for ratio in ratios.split())


@needs_two
def test_a_block_within_a_block_and_after_it() -> None:
    code = """
import threading, torch
from mwpb_fast.system import threads
count = lambda: sum(t.name == "mwpb-openmp-watch" for t in threading.enumerate())
with threads.adaptive_openmp_waits():
    with threads.adaptive_openmp_waits():
        print(count())
    print(count())
print(count())
"""
    assert child(code).split() == ["1", "1", "0"]


def doctor(**environment: str) -> str:
    """What `doctor` says of OpenMP in a process of its own."""
    text = child("import sys; from mwpb_fast.cli import main; sys.exit(main())", "doctor", "--json", **environment)
    return next(f["detail"] for f in json.loads(text)["findings"] if f["name"] == "openmp")


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"])
def test_doctor_says_what_the_user_chose(name: str) -> None:
    value = {"OMP_WAIT_POLICY": "passive"}.get(name, "3")
    assert f"{name}={value}" in doctor(**{name: value})


@needs_two
def test_doctor_says_what_was_chosen() -> None:
    assert ("spin, but sleep" in doctor()) == (threads.waited() is not None)
