"""The suite's stages in one process, what stays of them, and what is looked at in a step besides its time."""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import AT, batch, capture, make_step
from test_bench_suite import content, run, suite  # noqa: F401  # the latter is a fixture

from mwpb_fast.engine.build import OF_TRITON

CPU = torch.device("cpu")
SCRIPT = """
import json, os, sys
from pathlib import Path
o = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with Path({ran!r}).open("a") as file:
    file.write(f"{{os.getpid()}} {{o['--do']}}\\n")
if o["--do"] == "raises":
    raise LookupError("why it failed")
if o["--do"] == "dies":
    print("last words", flush=True)
    os.abort()
command = "python " + " ".join(sys.argv)
Path(o["--json"]).write_text(json.dumps(dict(command=command, rows=[o["--do"]], columns=[])))
print("in the log")
"""


def test_stages_share_a_process_until_one_crashes_and_all_of_it_is_packed(
    suite: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    ran, out = tmp_path / "ran", tmp_path / "out"
    (tmp_path / "bench" / "fake.py").write_text(SCRIPT.format(ran=str(ran)))
    suite.stages("a", "raises", "b", "dies", "c", "d")
    assert run(suite, out) == 1
    processes = [line.split()[0] for line in ran.read_text().splitlines()]
    assert len(set(processes[:4])) == len(set(processes[4:])) == 1
    assert processes[3] != processes[4]
    assert content(out, "summary")["stages"] == {
        "a": "done in 0 s",
        "raises": "failed: ended with 1",
        "b": "done in 0 s",
        "dies": "failed: ended with -6",
        "c": "done in 0 s",
        "d": "done in 0 s",
    }
    assert (out / "a.log").read_text() == "in the log\n"
    log = (out / "raises.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "LookupError: why it failed" in log
    assert "LookupError: why it failed" in content(out, "raises")["tail"]
    log = (out / "dies.log").read_text()
    assert "last words" in log
    assert "Fatal Python error: Aborted" in log  # with the frames where it was
    with tarfile.open(out / "results.tar.gz") as archive:
        names = set(archive.getnames())
        assert names == {path.name for path in out.iterdir()} - {"results.tar.gz"}
        packed = archive.extractfile("summary.json")
        assert packed is not None
        assert json.load(packed) == content(out, "summary")


def test_after_each_stage_the_archive_holds_what_there_is(
    suite: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, pack, out = [], suite.pack, tmp_path / "out"

    def noted(folder: Path) -> None:
        pack(folder)
        with tarfile.open(folder / "results.tar.gz") as archive:
            packed.append({name for name in archive.getnames() if name.endswith(".json")})

    monkeypatch.setattr(suite, "pack", noted)
    suite.stages("one", "crash")
    run(suite, out)
    summary = {"summary.json"}
    assert packed == [summary, summary | {"one.json"}, summary | {"one.json", "crash.json"}]


def test_the_tests_that_tell_most_come_first_in_several_processes(
    suite: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    for name in ("ops/test_dispatch", "test_twin", "test_capture_runs", "test_tune", "test_other"):
        mark = "" if name == "test_other" else "@pytest.mark.gpu"
        (tmp_path / "tests" / f"{name}.py").write_text(mark)
    o = argparse.Namespace(quick=False)
    monkeypatch.setattr(suite.commands.os, "cpu_count", lambda: 16)
    for installed, expected in ((None, []), (object(), ["-n", "10"])):
        monkeypatch.setattr(suite.commands, "find_spec", lambda name, found=installed: found)
        words = suite.commands.pytest_words(o, 1.0, tmp_path / "tests.json")
        ours = [f"tests/{n}.py" for n in ("test_capture_runs", "test_tune", "test_twin", "ops/test_dispatch")]
        start = words.index("-q") + 1
        assert words[start:-1] == [*expected, "-m", "gpu", *ours]
        assert "--tb=long" in words


def test_a_part_of_the_suite_as_it_is(tmp_path: Path, bench: Any) -> None:
    found = run(bench("gpu_suite"), tmp_path, "--stages", "layouts")
    assert found == 0, (tmp_path / "layouts.log").read_text()
    rows = content(tmp_path, "layouts")["rows"]
    assert [(row["arithmetic"], row["layout"]) for row in rows] == [
        ("float32", "contiguous"),
        ("float32", "channels-last"),
    ]


def test_the_step_comes_before_what_it_is_compared_with(bench: Any) -> None:
    names = [stage.name for stage in bench("stages").STAGES]
    assert names[:6] == ["tests", "train", "training", "equivalence", "kernels", "layouts"]
    parts = bench("kernels").FIRST
    assert set(parts) <= set(bench("kernels").OPS)
    assert parts[0] == "linf_step_"


def test_without_git_the_commit_is_what_the_environment_says(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench("measure")

    def no_git(*words: Any, **more: Any) -> Any:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(measure.subprocess, "run", no_git)
    monkeypatch.setenv("MWPB_COMMIT", "0123456789ab")
    assert measure.commit() == "0123456789ab"
    monkeypatch.delenv("MWPB_COMMIT")
    assert measure.commit() == "unknown"


# what is looked at --------------------------------------------------------------------------------------------
def test_the_eager_step_is_captured_too_and_determinism_has_its_row(bench: Any) -> None:
    kinds = bench("steps").variants(torch.bfloat16)
    names = {name for name, kind in kinds.items() if kind.captured and not kind.compiled}
    assert names == {
        "eager bfloat16 captured",
        "twin bfloat16 captured",
        "twin bfloat16 captured epilogue",
        "twin bfloat16 captured fused",
        "twin bfloat16 captured deterministic",
        "twin bfloat16 captured with a fused training pass",
        *(f"{name} bfloat16 captured" for name in ("by_hand", "halves", *OF_TRITON)),
    }
    assert [name for name, kind in kinds.items() if kind.deterministic] == ["twin bfloat16 captured deterministic"]


@pytest.mark.parametrize("wrong", [False, True])
def test_what_is_captured_is_verified_and_its_kernels_are_listed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    """By a fake graph; a wrong one leaves a weight as it was."""
    train, steps = bench("train"), bench("steps")
    seen: set[bool] = set()
    step = capture(make_step())
    (x, y, index), key = batch(0)
    batches = steps.Batches([x.contiguous()], [y], index, key)
    run = steps.Run(step, [x], batches, AT, True)
    run(0)
    recorder = step._program.recorder
    replay = recorder.replay

    def replayed() -> None:
        seen.add(torch.backends.cudnn.deterministic)
        replay()
        if wrong:
            step.step.model.linear.bias.data.add_(1)

    monkeypatch.setattr(recorder, "replay", replayed)
    more: dict[str, Any] = {"kernels": {}}
    results = bench("record").Results(None, CPU, [], [], **more)
    o = argparse.Namespace(device=CPU)
    found = train.looked_into("captured", run, "r", o, results)
    assert found["verified"] == ("no: 1, such as model.linear.bias" if wrong else "yes")
    assert found["kernels"] == sum(row["count"] for row in results.more["kernels"]["r: captured"])
    listed = [row["name"] for row in results.more["kernels"]["r: captured"]]
    assert "aten::convolution_backward" in listed
    assert seen == {True}
    assert not torch.backends.cudnn.deterministic
    eager = steps.Run(make_step(), [x], batches, AT, False)
    assert "verified" not in train.looked_into("eager", eager, "r", o, results)


def test_what_cannot_be_looked_into_costs_only_that(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, results = bench("train"), bench("record").Results(None, CPU, [], [], kernels={})
    monkeypatch.setattr(train, "kernels", lambda *words: 1 / 0)
    (x, y, index), key = batch(0)
    eager = bench("steps").Run(make_step(), [x], bench("steps").Batches([x], [y], index, key), AT, False)
    assert train.looked_into("eager", eager, "r", argparse.Namespace(device=CPU), results) == {}
    assert results.skipped == {"r: eager, looked into": "division by zero"}
    assert "ZeroDivisionError" in capsys.readouterr().err  # with its traceback


def test_one_epoch_alone_says_nothing_of_speed(bench: Any) -> None:
    training = bench("short_training")
    o = argparse.Namespace(archive=None)
    record = {"seconds": 9.0, "images_per_second": 1.0, "wait_share": 0.5, "checkpoint": 0.1, "loss": 2.0}
    record |= {"bad_steps": 0}
    config = training.recipe("digits.at")
    keys = ("seconds_an_epoch", "images_per_second", "wait_share", "checkpoint", "validation")
    alone = training.measured(config, [record], o)
    assert [alone[key] for key in keys] == [None] * 5
    later = training.measured(config, [record, record | {"seconds": 2.0, "validation": 0.25}], o)
    assert [later[key] for key in keys] == [2.0, 1.0, 0.5, 0.1, 0.25]
