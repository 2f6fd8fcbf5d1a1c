"""The command itself: it trains, evaluates, renders, goes on after stops and kills, and survives a failing row."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mwpb_fast import cli, data, train
from mwpb_fast.evaluation.checkpoint import evaluate_run
from mwpb_fast.evaluation.request import Request
from mwpb_fast.runs import checkpoint
from mwpb_fast.system.signals import Interrupted

ROOT = Path(__file__).resolve().parents[1]
DIGITS = [
    "--data.name=digits", "--data.pad=1", "--data.flip=false", "--data.batch_size=32", "--subset=192",
    "--model=smallresnet-8", "--attack.steps=2", "--epochs=3", "--attacks=natural,pgd2", "--test-subset=20",
    "--rows=control_at,mwpb_at", "--seeds=1", "--quiet",
]  # fmt: skip


def reproduce(out: Path, *words: str) -> int:
    return cli.main(["reproduce", "table1", *DIGITS, *words, "--out", str(out)])


def seeds_of(out: Path) -> list[Path]:
    return sorted((out / "runs").glob("*/seed*"))


def weights(out: Path) -> dict[str, dict[str, Any]]:
    """Folder -> the weights of its last checkpoint."""
    found = {}
    for folder in seeds_of(out):
        newest = checkpoint.read_newest(folder / "checkpoints", "last")
        assert newest is not None
        found["/".join(folder.parts[-2:])] = newest[1]["model"]
    return found


def timeless(out: Path) -> dict[str, Any]:
    """The table without what the clock says."""
    text = (out / "table1" / "table.json").read_text()
    return json.loads(text, object_hook=lambda o: {k: v for k, v in o.items() if not k.endswith("seconds")})


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for folder in mine:
        assert all(torch.equal(mine[folder][key], theirs[folder][key]) for key in mine[folder]), folder
    assert timeless(one)["rows"] == timeless(other)["rows"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert reproduce(out) == 0
    return out


def test_everything_is_there(whole: Path) -> None:
    assert len(seeds_of(whole)) == 2
    for folder in seeds_of(whole):
        results = json.loads((folder / "results.json").read_text())
        assert results.keys() == {"best", "last"}
        for kept in results.values():
            assert {key.split()[0] for key in kept} == {"natural", "pgd2"}
            for found in kept.values():
                assert found["images"] == 20
                assert len(found["model_sha256"]) == 64
    table = json.loads((whole / "table1" / "table.json").read_text())
    assert [run["state"] for row in table["rows"] for run in row["runs"]] == ["done"] * 2
    for row in table["rows"]:
        cell = row["cells"]["natural"]
        assert cell["best"]["n"] == cell["last"]["n"] == 1
    markdown = (whole / "table1" / "table.md").read_text()
    assert "2 of 2 runs are complete." in markdown
    assert "data.name digits instead of cifar10" in markdown
    assert (whole / "table1" / "table.csv").read_text().count("\n") == 1 + 2 * 7 * 2


def test_values_are_those_of_the_evaluation(whole: Path) -> None:
    table = json.loads((whole / "table1" / "table.json").read_text())
    for row in table["rows"]:
        for run in row["runs"]:
            (folder,) = [f for f in seeds_of(whole) if "/".join(f.parts[-3:]) == run["folder"]]
            result = evaluate_run(Request(folder, which="last", show=False))
            values = row["cells"]["natural"]["last"]["values"]
            assert values[str(run["seed"])] == result["attacks"]["natural"]["accuracy"]


def test_a_second_call_trains_and_attacks_nothing(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*words: Any, **more: Any) -> None:
        raise AssertionError("nothing is to be done")

    monkeypatch.setattr(train, "run", never)
    monkeypatch.setattr("mwpb_fast.reproduce.execute.evaluate_run", never)
    before = timeless(whole)
    assert reproduce(whole) == 0
    assert "2 runs in" in (out := capsys.readouterr().out)
    assert "2 done" in out
    assert timeless(whole) == before


def test_another_attack_is_added_without_training(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    monkeypatch.setattr(train, "run", None)
    assert reproduce(out, "--attacks=natural,pgd3") == 0
    assert "| pgd3 |" in (out / "table1" / "table.md").read_text()
    before = timeless(whole)
    assert reproduce(out, "--render-only") == 0
    assert [row["cells"] for row in timeless(out)["rows"]] == [row["cells"] for row in before["rows"]]


@pytest.mark.parametrize("looks", [4, 22])
def test_stopped_and_gone_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM at a step of the first or the second run; 143, and then the same as if there had been none."""
    steps = 0
    step = train.Step.__call__

    def stopping(self: Any, *words: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == looks:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *words)

    monkeypatch.setattr(train.Step, "__call__", stopping)
    assert reproduce(tmp_path) == 143
    assert "the same command goes on" in capsys.readouterr().err
    assert reproduce(tmp_path) == 0
    assert_same(whole, tmp_path)


def test_stopped_while_evaluating(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*words: Any, **more: Any) -> None:
        raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("mwpb_fast.reproduce.execute.evaluate_run", stopped)
        assert reproduce(tmp_path) == 130
    assert len(seeds_of(tmp_path)) == 1
    assert reproduce(tmp_path) == 0
    assert_same(whole, tmp_path)


def test_killed_and_gone_on(whole: Path, tmp_path: Path) -> None:
    """kill -9 once the second run has begun to train."""
    script = [sys.executable, "-m", "mwpb_fast", "reproduce", "table1", *DIGITS]
    log = tmp_path / "log"
    out = tmp_path / "out"
    with log.open("w") as file:
        process = subprocess.Popen([*script, "--out", str(out)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while "[2/2]" not in log.read_text() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
    assert reproduce(out) == 0
    assert_same(whole, out)


def test_a_row_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.run

    def failing(config: Any, folder: Path, **more: Any) -> Any:
        if config.budget.alpha == 0:
            raise train.TrainingError("epoch 1: loss not finite")
        return run(config, folder, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "run", failing)
        assert reproduce(tmp_path) == 1
    captured = capsys.readouterr()
    assert "table1.control_at seed 0 failed: epoch 1: loss not finite" in captured.err
    markdown = (tmp_path / "table1" / "table.md").read_text()
    assert "1 of 2 runs are complete." in markdown
    assert "- table1.control_at seed 0: failed: epoch 1: loss not finite" in markdown
    assert "| AT, two-phase control | ours, best | - | - |" in markdown
    assert reproduce(tmp_path) == 0
    assert "2 of 2 runs are complete." in (tmp_path / "table1" / "table.md").read_text()


def test_two_processes_share_the_runs(whole: Path, tmp_path: Path) -> None:
    """Each run is trained once, and both end with the whole table."""
    script = [sys.executable, "-m", "mwpb_fast", "reproduce", "table1", *DIGITS, "--out", str(tmp_path)]
    both = [subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert sum(out.count(": training in") for out in outs) == 2
    assert all("2 of 2 runs are complete." in out for out in outs)
    assert_same(whole, tmp_path)


def test_a_run_that_another_process_has_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reproduce(tmp_path, "--render-only") == 0
    plan = capsys.readouterr().out
    (line,) = [line for line in plan.splitlines() if line.startswith("control_at")]
    folder = tmp_path / "runs" / line.split()[-1]
    folder.mkdir(parents=True)
    order = []
    run = train.run
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def recording(config: Any, where: Path, **more: Any) -> Any:
            order.append(config.recipe)
            return run(config, where, **more)

        monkeypatch.setattr(train, "run", recording)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(file, fcntl.LOCK_UN))
        assert reproduce(tmp_path) == 0
    assert order == ["table1.mwpb_at", "table1.control_at"]
    assert "another process has it" in capsys.readouterr().out


def test_render_only_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "table3", "--render-only", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "27 runs in" in out
    assert "| MWPB-TRADES | paper | 90.30 | 60.25 | 55.03 | 50.11 |" in out
    assert not (tmp_path / "runs").exists()
    assert sorted(path.name for path in (tmp_path / "table3").iterdir()) == ["table.csv", "table.json", "table.md"]


def test_a_data_set_that_is_not_there_ends_it_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", "table1", "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out" / "runs").exists()


def test_an_attack_that_cannot_run_ends_it_before_anything_is_trained(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run", None)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyautoattack", None)
        assert reproduce(out, "--attacks=natural,aa") == 2
        assert "mwpb-fast[eval]" in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
        shutil.copytree(whole, tmp_path / "done")
        assert reproduce(tmp_path / "done") == 0  # what is there needs no attack
    digits = data.load_split(data.Config(name="digits"), "test")
    few = data.Images(digits.images, digits.labels % 3, ("0", "1", "2"))
    monkeypatch.setattr(data, "load_split", lambda config, split: few)
    assert reproduce(out, "--attacks=natural,apgd-t") == 2
    assert "at least 4 classes, the model has 3" in capsys.readouterr().err
    assert not (out / "runs").exists()
