"""The suite for a CUDA machine, at toy size on the CPU: stages, limits, failures, going on, what is missing."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKE = """
import argparse, json, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--device"); parser.add_argument("--json"); parser.add_argument("--do", default="")
o = parser.parse_args()
Path({runs!r}).open("a").write(o.do + " ")
if o.do == "hang":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path({child!r}).write_text(str(child.pid))
    time.sleep(60)
if o.do == "crash":
    print("what went wrong"); sys.exit(3)
if o.do == "silent":
    sys.exit(0)
command = "python " + " ".join(sys.argv)
Path(o.json).write_text(json.dumps(dict(command=command, rows=[], columns=[])))
"""


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The suite's module, with stages of a script that does as it is told; `suite.ran()` says what it was told."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module: Any = importlib.import_module("gpu_suite")
    (tmp_path / "bench").mkdir()
    runs, child = tmp_path / "runs", tmp_path / "child"
    runs.touch()
    (tmp_path / "bench" / "fake.py").write_text(FAKE.format(runs=str(runs), child=str(child)))
    monkeypatch.setattr(module, "ROOT", tmp_path)

    def stages(*things: str, needs: tuple[str, ...] = ()) -> None:
        made = [module.Stage(t, 10, module.script("fake", f"--do {t}", f"--do {t}"), needs) for t in things]
        monkeypatch.setattr(module, "STAGES", tuple(made))

    module.stages, module.child = stages, child
    module.ran = lambda: runs.read_text().split()
    previous = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, previous)


def content(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def run(suite: Any, out: Path, *words: str) -> int:
    return suite.main(["--device", "cpu", "--quick", "--out", str(out), *words])


def test_complete_stages_are_not_run_again(suite: Any, tmp_path: Path) -> None:
    suite.stages("one", "two")
    out = tmp_path / "out"
    assert run(suite, out, "--stages", "one") == 0
    assert run(suite, out) == 0
    assert suite.ran() == ["one", "two"]
    assert content(out, "summary")["stages"] == {"one": "complete before", "two": "done in 0 s"}
    (out / "two.json").write_text('{"rows": [')  # as if it had been cut off
    assert run(suite, out) == 0
    assert suite.ran() == ["one", "two", "two"]
    (out / "one.json").write_text(json.dumps({"command": "python bench/fake.py --do other", "rows": []}))
    assert run(suite, out) == 0
    assert suite.ran()[-1] == "one"


@pytest.mark.parametrize(("kind", "reason"), [("crash", "ended with 3"), ("silent", "left no result")])
def test_a_failed_stage_costs_only_itself(suite: Any, tmp_path: Path, kind: str, reason: str) -> None:
    suite.stages(kind, "one")
    out = tmp_path / "out"
    assert run(suite, out) == 1
    assert content(out, kind)["failed"] == reason
    assert ("what went wrong" in content(out, kind)["tail"]) == (kind == "crash")
    assert content(out, "summary")["stages"]["one"].startswith("done")
    assert run(suite, out) == 1
    assert suite.ran() == [kind, "one", kind]


def test_a_hanging_stage_is_ended_with_all_that_it_started(suite: Any, tmp_path: Path) -> None:
    suite.stages("hang", "one")
    started = time.monotonic()
    assert run(suite, tmp_path / "out", "--budget", "8") == 1
    assert time.monotonic() - started < 20
    found = content(tmp_path / "out", "summary")["stages"]
    assert found["hang"] == "failed: cut off after 4 s"
    assert found["one"].startswith("done")
    child = int(suite.child.read_text())
    for _ in range(50):  # until whoever adopts orphans has buried it
        if not running(child):
            break
        time.sleep(0.1)
    assert not running(child)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_missing_package_is_named(suite: Any, tmp_path: Path) -> None:
    suite.stages("one", needs=("no_such_package",))
    assert run(suite, tmp_path / "out") == 0
    assert content(tmp_path / "out", "one")["rows"] == [{"skipped": "no_such_package not installed"}]
    assert suite.ran() == []


def test_what_there_is_no_time_for_is_not_begun(suite: Any, tmp_path: Path) -> None:
    suite.stages("one")
    assert run(suite, tmp_path / "out", "--budget", "0.5") == 1
    assert content(tmp_path / "out", "summary")["stages"] == {"one": "not begun: out of time"}


def test_tests_are_counted_from_their_report(suite: Any, tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(
        "<testsuites><testsuite><testcase classname='a' name='x'/><testcase classname='a' name='y'>"
        "<failure/></testcase><testcase classname='a' name='z'><skipped/></testcase></testsuite></testsuites>"
    )
    suite.pytest_result(["python", "-m", "pytest"], tmp_path / "t.json", suite.argparse.Namespace(device="cpu"))
    (row,) = content(tmp_path, "t")["rows"]
    assert row == {"tests": 3, "passed": 1, "skipped": 1, "failed": 1, "names": ["a::y"]}


def test_every_stage_has_a_script_that_takes_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    suite: Any = importlib.import_module("gpu_suite")
    for quick in (False, True):
        o = suite.argparse.Namespace(device="cpu", quick=quick, archive=tmp_path / "a.tar.xz")
        for stage in suite.STAGES:
            script, *words = stage.words(o, 10.0, tmp_path / "x.json")
            if script == "-m":
                continue
            text = (ROOT / script).read_text()
            for word in words:
                assert not word.startswith("--") or f'"{word}"' in text, f"{stage.name}: {word}"
                assert not {"{", "}"} & set(word), word
    assert sum(stage.weight for stage in suite.STAGES) <= 540


def test_training_and_its_evaluation_need_no_jsonargparse(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    code = (
        "import sys\n"
        "for name in ('jsonargparse', 'pyautoattack', 'nvidia.dali'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT / 'bench')!r})\n"
        "import short_training\n"
        "short_training.main(sys.argv[1:])\n"
    )
    words = ["--epochs=1", "--subset=128", "--test-images=20", "--model=smallresnet-2", "--device=cpu", "--json"]
    command = [sys.executable, "-c", code, *words, str(out)]
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"PYTHONPATH": search_path()})
    (row,) = json.loads(out.read_text())["rows"]
    assert row["epochs"] == 1
    assert row["bad_steps"] == 0
    assert 0 <= row["pgd20"] <= row["natural"] <= 100
    assert 0 < row["wait_share"] < 1


def search_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])


@pytest.mark.slow
def test_the_whole_suite_at_toy_size(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--device", "cpu", "--quick"]
    done = subprocess.run([*script, "--out", str(tmp_path)], timeout=580, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in content(tmp_path, "summary")["stages"]:
        assert content(tmp_path, name)["rows"], name
    assert content(tmp_path, "tests")["rows"][0]["failed"] == 0
