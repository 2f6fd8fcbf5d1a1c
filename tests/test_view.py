"""What a training run shows, to people and to programs, and trackers that get its records."""

from __future__ import annotations

import io
import json
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import tiny

from mwpb_fast import cli, train
from mwpb_fast.config import ConfigError
from mwpb_fast.runs.log import Progress, RunLog, progress, read_records
from mwpb_fast.runs.tracker import Tracker, require
from mwpb_fast.runs.view import View, memory
from mwpb_fast.system.units import duration, pace

WORDS = ["train", "digits.mwpb_at", "--data.subset=128", "--epochs=2", "--warmup_epochs=1", "--optim.drops=2",
         "--attack.steps=1", "--model.name=smallresnet-8", "--precision.device=cpu",
         "--evaluation.attacks=natural,fgsm", "--evaluation.subset=40"]  # fmt: skip


def stub(name: str, fails: str = "", takes_id: bool = True) -> tuple[types.ModuleType, list[tuple[str, Any]]]:
    """A module with the interface of a tracker, as far as it is used; and what it is called with."""
    calls: list[tuple[str, Any]] = []

    def call(kind: str, about: Any) -> None:
        calls.append((kind, about))
        print("a banner")
        if kind == fails:
            raise OSError(f"no network\nfor {kind}")

    def wandb(project: str, name: str, config: Any, resume: str, id: str, dir: str) -> None:
        call("init", {"project": project, "name": name, "config": config, "resume": resume, "id": id, "dir": dir})

    def trackio(project: str, name: str, config: Any, resume: str) -> None:
        call("init", {"project": project, "name": name, "config": config, "resume": resume})

    module: Any = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(origin="here")
    module.init = wandb if takes_id else trackio
    module.log = lambda numbers, step: call("log", (step, numbers))
    module.finish = lambda: call("finish", None)
    return module, calls


@pytest.mark.parametrize(("name", "takes_id"), [("wandb", True), ("trackio", False)])
def test_a_tracker_gets_the_records(
    name: str,
    takes_id: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, calls = stub(name, takes_id=takes_id)
    monkeypatch.setitem(sys.modules, name, module)
    train.run(tiny("--epochs=2"), tmp_path, view=View("quiet", name))
    assert [kind for kind, _ in calls] == ["init", "log", "log", "finish"]
    about = calls[0][1]
    assert (about["project"], about["name"], about["resume"]) == ("mwpb-fast", str(tmp_path), "allow")
    assert about["config"]["recipe"] == "digits.mwpb_at"
    assert len(about.get("id", "0" * 16)) == 16
    for (_, (step, numbers)), record in zip(calls[1:3], read_records(tmp_path / "metrics.jsonl"), strict=True):
        assert step == record["epoch"]
        assert numbers["loss"] == record["loss"]
        assert "bad_batches" not in numbers
    assert capsys.readouterr().out == ""
    # one that is gone on with is the same run there
    train.run(tiny("--epochs=3"), tmp_path, view=View("quiet", name))
    assert calls[4][1].get("id") == about.get("id")
    assert calls[5][1][0] == 3


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_its_own_records_only(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, calls = stub("trackio", fails)
    monkeypatch.setitem(sys.modules, "trackio", module)
    tracker = View("quiet", "trackio").tracker(tmp_path, tiny())
    log = RunLog(tmp_path, 1, tracker)
    for epoch in (1, 2):
        log.write({"epoch": epoch, "loss": 1.0})
    log.close()
    assert [record["epoch"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if f"no network for {fails}" in line]) == 1
    assert len(calls) == {"init": 1, "log": 2, "finish": 4}[fails]


def test_a_tracker_that_is_not_there_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    for name, cure in (("wandb", "pip install wandb"), ("trackio", r"pip install 'mwpb-fast\[track\]'")):
        with pytest.raises(ConfigError, match=f"--track {name}: it is not installed: {cure}"):
            require(name)
    assert cli.main([*WORDS, "--track", "wandb", "--out", str(tmp_path / "run")]) == 2
    assert "--track wandb: it is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError):
        Tracker("wandb", tmp_path, {})


def test_objects_in_place_of_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--json", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events if event["event"] != "progress"]
    assert kinds == ["start", "epoch", "epoch", "evaluation"]
    assert (events[0]["model"], events[0]["epochs"], events[0]["folder"]) == ("smallresnet-8", 2, str(tmp_path))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [{k: e[k] for k in records[0]} for e in events if e["event"] == "epoch"] == records
    saved = json.loads((tmp_path / "evaluation-best.json").read_text())
    assert events[-1]["attacks"]["fgsm"]["accuracy"] == saved["attacks"]["fgsm"]["accuracy"]
    assert events[-1]["worst"]["interval"] == saved["worst"]["interval"]
    assert "flags" not in json.dumps(events[-1])
    assert err == ""


def test_quiet_says_the_result_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--quiet", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("attack")
    assert not re.search("epoch|training|radii|drawn|report", out)
    assert err == ""


@pytest.mark.parametrize("form", ["lines", "json", "quiet"])
def test_progress_in_each_form(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: form != "lines")  # a terminal changes neither json nor quiet
    with progress(100, "epoch 1/2", every=-1.0, done=20, form=form) as bar:
        bar.advance(10, "loss 1.000", "more")
    out, err = capsys.readouterr()
    assert (bool(out), bool(err)) == {"lines": (False, True), "json": (True, False), "quiet": (False, False)}[form]
    if form == "json":
        found = json.loads(out)
        assert (found["event"], found["what"], found["done"], found["of"]) == ("progress", "epoch 1/2", 30, 100)
    elif form == "lines":
        assert err.startswith("epoch 1/2: 30/100, ")
        assert "more" not in err


def test_the_live_view_says_what_a_step_is_like(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    view = View()
    record = {
        "phase": "main",
        "radius_min": 3 / 255,
        "radius_mean": 5.5 / 255,
        "radius_max": 8 / 255,
        "learning_rate": 0.1,
        "loss": 1.0,
    }
    view.epoch(
        {**record, "epoch": 1, "natural": 81.24, "robust": 48.0, "images_per_second": 1.0, "checkpoint": 0.0}, 9
    )
    assert " radius 5.5 (3.0 to 8.0)/255 lr 0.1 " in capsys.readouterr().out  # as the view says it
    with progress(1000, "epoch 2/9 [red]") as bar:
        row = torch.tensor([1.5, 4 / 255, 6 / 255, 9 / 255, 1.0])
        assert "left" not in view.step(bar, row, 7)[1]  # nothing is done yet
        bar.advance(50)
        note, status = view.step(bar, row, 7)
        bar.advance(50, note, status)
        bar.live.refresh()
    assert note == "loss 1.500"
    assert status.startswith("loss 1.500, radius 6.0 (4.0 to 9.0)/255, natural 81.2 % robust 48.0 %, run: ")
    shown = terminal.getvalue()
    for part in ("epoch 2/9 [red]", "10%", "images/s", "radius 6.0 (4.0 to 9.0)/255", "robust 48.0 %"):
        assert part in shown


def test_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch holds of it: asked without waiting for the device, and nothing on a CPU."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 2**29)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=80 * 2**30)
    )
    assert memory(torch.device("cuda", 1)) == "GPU 2.5 of 80 GiB"
    assert memory(torch.device("cpu")) == ""


def test_time_left_of_the_run() -> None:
    bar = Progress(1000, "", "images")
    bar.started, bar.done = time.monotonic() - 10, 500
    view = View()
    view._beside = 5.0
    _, status = view.step(bar, torch.tensor([1.0, 0.1, 0.1, 0.1]), 3)
    assert status.startswith("loss 1.000, radius 25.5/255, run: ")
    assert status.endswith((f"run: {duration(90)} left", f"run: {duration(89)} left", f"run: {duration(91)} left"))


def test_times_and_speeds_as_people_read_them() -> None:
    seconds = (45, 119, 120, 3 * 3600 + 301, 187300)
    assert [duration(s) for s in seconds] == ["45 s", "119 s", "2 min", "3 h 5 min", "2 d 4 h"]
    told = ["1,235 images/s", "10 images/s", "4.2 images/s", "1.0 images/s", "3.2 s/image", "100 s/image", ""]
    assert [pace(rate, "images") for rate in (1234.6, 9.96, 4.2, 1.0, 0.3125, 0.01, 0.0)] == told
    assert pace(0.5, "training passes") == "2.0 s/training pass"


def test_a_time_left_is_told_once_enough_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an attack of 1,000 images, 200 of them done before, 10 s an image."""
    now = 0.0
    monkeypatch.setattr("mwpb_fast.runs.log.time", types.SimpleNamespace(monotonic=lambda: now))
    with progress(1000, "aa", every=-1.0, done=200, sure=0.05) as bar:
        for n in (0, 1, 38, 1, 748, 12):
            now += 10.0 * n
            bar.advance(n, "(square)")
    assert capsys.readouterr().err.splitlines() == [
        "aa: 200/1000, (square)",
        "aa: 201/1000, 10 s/image (square)",
        "aa: 239/1000, 10 s/image (square)",
        "aa: 240/1000, 10 s/image (square), 2 h 6 min left",
        "aa: 988/1000, 10 s/image (square), 2 min left",
        "aa: 1000/1000, 10 s/image (square), 0 s left",
    ]
