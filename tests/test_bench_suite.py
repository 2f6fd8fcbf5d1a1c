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
import argparse, json, signal, sys, time
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
if o.do in ("slow", "fragile", "brief"):
    path, left, rows = Path(o.json), ["a", "b", "c"], []
    if path.exists():
        found = json.loads(path.read_text())
        left, rows = found["unfinished"], found["rows"]
    for name in list(left):
        left.remove(name)
        rows.append(name)
        more = dict(unfinished=left) if left else dict()
        path.write_text(json.dumps(dict(command=command, rows=rows, columns=[], **more)))
        if o.do == "slow" and name == "b":
            signal.signal(signal.SIGTERM, lambda *_: (Path({child!r}).write_text("asked"), sys.exit(143)))
            time.sleep(60)
        if o.do == "fragile" and name == "b":
            sys.exit(9)
        if o.do == "brief" and name == "b":
            sys.exit(0)
    sys.exit(0)
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
    commands: Any = importlib.import_module("stages")
    for one in (module, commands):
        monkeypatch.setattr(one, "ROOT", tmp_path)

    def stages(*things: str, needs: tuple[str, ...] = ()) -> None:
        made = [module.Stage(t, 10, commands.script("fake", f"--do {t}", f"--do {t}"), needs) for t in things]
        monkeypatch.setattr(module, "STAGES", tuple(made))

    module.stages, module.child, module.commands = stages, child, commands
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
    assert run(suite, tmp_path / "out", "--budget", "8") == 1
    found = content(tmp_path / "out", "summary")["stages"]
    assert found["hang"] == "failed: cut off after 4 s"
    assert found["one"].startswith("done")
    child = int(suite.child.read_text())
    for _ in range(50):  # until whoever adopts orphans has buried it
        if not running(child):
            break
        time.sleep(0.1)
    assert not running(child)


def test_a_stage_that_is_cut_off_leaves_its_rows_and_goes_on(suite: Any, tmp_path: Path) -> None:
    suite.stages("slow")
    out = tmp_path / "out"
    assert run(suite, out, "--budget", "4") == 1
    assert suite.child.read_text() == "asked"  # by SIGTERM
    found = content(out, "slow")
    assert (found["rows"], found["unfinished"], found["failed"]) == (["a", "b"], ["c"], "cut off after 4 s")
    assert content(out, "summary")["stages"]["slow"] == "failed: cut off after 4 s; without c"
    assert run(suite, out, "--budget", "4") == 0
    found = content(out, "slow")
    assert found["rows"] == ["a", "b", "c"]
    assert not {"failed", "unfinished"} & set(found)
    assert run(suite, out, "--budget", "4") == 0
    assert suite.ran() == ["slow", "slow"]


def test_a_stage_that_crashes_goes_on_after_what_it_had_done(suite: Any, tmp_path: Path) -> None:
    suite.stages("fragile")
    assert run(suite, tmp_path / "out") == 0
    assert suite.ran() == ["fragile", "fragile"]
    assert content(tmp_path / "out", "fragile")["rows"] == ["a", "b", "c"]


def test_what_a_stage_leaves_to_the_next_run_is_no_failure(suite: Any, tmp_path: Path) -> None:
    suite.stages("brief")
    assert run(suite, tmp_path / "out") == 0
    assert content(tmp_path / "out", "summary")["stages"]["brief"] == "done in 0 s; without c"
    assert run(suite, tmp_path / "out") == 0
    assert suite.ran() == ["brief", "brief"]
    assert content(tmp_path / "out", "summary")["stages"]["brief"] == "done in 0 s"


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
    command, o = ["python", "-m", "pytest"], suite.argparse.Namespace(device="cpu")
    suite.commands.pytest_result(command, tmp_path / "t.json", o, False)
    (row,) = content(tmp_path, "t")["rows"]
    assert row == {"tests": 3, "passed": 1, "skipped": 1, "failed": 1, "names": ["a::y"]}
    assert suite.complete(tmp_path / "t.json", command)


def test_tests_that_are_cut_off_are_counted_as_far_as_they_came(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_one(): pass\ndef test_two(): assert 0\ndef test_three(): time.sleep(60)\n"
    )

    def words(o: Any, limit: float, out: Path) -> list[str]:
        script, module, *options = suite.commands.pytest_words(o, limit, out)
        where = options.index("tests/test_bench_tables.py")
        return [script, module, *options[:where], str(tmp_path / "test_slow.py"), *options[where + 1 :]]

    (tmp_path / "bench" / "interruptible.py").write_bytes((ROOT / "bench" / "interruptible.py").read_bytes())
    monkeypatch.setattr(suite, "STAGES", (suite.Stage("tests", 10, words, finish=suite.commands.pytest_result),))
    assert run(suite, tmp_path / "out", "--budget", "8") == 1
    found = content(tmp_path / "out", "tests")
    assert found["rows"] == [
        {"tests": 2, "skipped": 0, "failed": 1, "passed": 1, "names": ["test_slow::test_two"]}
    ]
    assert found["failed"] == "cut off after 8 s"
    assert found["unfinished"] == ["the other tests"]


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
            if "command_line(__doc__)" in text:  # what most scripts take
                text += (ROOT / "bench" / "measure.py").read_text()
            for word in words:
                assert not word.startswith("--") or f'"{word}"' in text, f"{stage.name}: {word}"
                assert not {"{", "}"} & set(word), word
    assert sum(stage.weight for stage in suite.STAGES) + 15 <= 540  # to start, to end the last stage, to sum up


def test_training_and_its_evaluation_need_no_jsonargparse(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    code = (
        "import sys\n"
        "for name in ('jsonargparse', 'pyautoattack', 'nvidia.dali'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT / 'bench')!r})\n"
        "import short_training\n"
        "short_training.main(sys.argv[1:])\n"
    )
    words = ["--epochs=2", "--subset=64", "--test-images=20", "--model=smallresnet-8", "--device=cpu", "--json"]
    command = [sys.executable, "-c", code, *words, str(out)]
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"PYTHONPATH": search_path()})
    (row,) = json.loads(out.read_text())["rows"]
    assert row["epochs"] == 2
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
