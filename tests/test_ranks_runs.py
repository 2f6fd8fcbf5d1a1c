"""Runs in several processes: one, two and four train as one, go on as another number, and end as they should."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_cases import METHODS, apart, at_once, final, stopped, tiny, trained
from test_reproduce_runs import DIGITS
from test_train import assert_same

from mwpb_fast import train
from mwpb_fast.config import Config
from mwpb_fast.evaluation import validation
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.log import read_records
from mwpb_fast.system import ranks

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
COMMAND = ["-m", "mwpb_fast", "train", "digits.at", "--data.subset=64", "--data.batch_size=16", "--attack.steps=1",
           "--model.name=smallresnet-16", "--no-evaluate"]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_one_two_and_four_processes_train_as_one(tmp_path: Path, name: str) -> None:
    """After two epochs; the order in which sums are rounded is all that differs. Where that decides the sign of a
    gradient, two runs part for good, so there are three seeds to do it with: a fault would part them with each."""
    far: list[float] = []
    for place in (tmp_path / str(seed) for seed in range(3)):
        config = tiny(name, "--epochs=2", f"--seed={place.name}")
        for count in (1, 2, 4):
            at_once(count, trained, config, place / str(count))
        far.append(max(apart(place / "1", place / str(count)) for count in (2, 4)))
        if far[-1] < 1e-3:
            break
    assert min(far) < 1e-3, far
    natural = [read_records(place / str(count) / "metrics.jsonl")[-1]["natural"] for count in (1, 2, 4)]
    assert max(natural) - min(natural) < 4  # one of 29 held-out images


@pytest.mark.parametrize(("looks", "epoch", "batch"), [(2, 1, 3), (7, 2, 1)])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_a_run_of_so_many_processes_goes_on_in_another_number(
    tmp_path: Path, before: int, after: int, looks: int, epoch: int, batch: int
) -> None:
    """Also in the middle of an epoch, and with what the attack remembers of each image."""
    config = tiny("adaptive", "--epochs=2")
    trained(config, tmp_path / "whole")
    numbers = at_once(before, stopped, config, tmp_path / "cut", looks, 0)
    assert numbers == [signal.SIGTERM] * before
    assert (final(tmp_path / "cut")["epoch"], final(tmp_path / "cut")["batch"]) == (epoch, batch)
    at_once(after, trained, config, tmp_path / "cut")
    assert apart(tmp_path / "whole", tmp_path / "cut") < 1e-3


def test_as_many_processes_go_on_to_the_bit_and_stop_where_one_of_them_is_told_to(tmp_path: Path) -> None:
    config = tiny("trades", "--epochs=2")
    at_once(4, trained, config, tmp_path / "whole")
    assert at_once(4, stopped, config, tmp_path / "cut", 3, 2) == [signal.SIGTERM] * 4
    assert final(tmp_path / "cut")["batch"] > 0
    at_once(4, trained, config, tmp_path / "cut")
    whole, cut = final(tmp_path / "whole"), final(tmp_path / "cut")
    for name in ("model", "optimizer", "trace"):
        assert_same(whole[name], cut[name], name)


def test_a_batch_for_each_process_trains_as_one_large_batch(tmp_path: Path) -> None:
    config = tiny("at", "--data.batch_size=8", "--distributed.per_rank=linear")
    at_once(2, trained, config, tmp_path / "two")
    large = tiny("at", "--data.batch_size=16", "--optim.lr=0.02")
    trained(large, tmp_path / "one")
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-4
    trained(large, tmp_path / "two")  # it is the same run


def test_statistics_of_a_part_of_the_batch_are_averaged(tmp_path: Path) -> None:
    config = tiny("at", "--distributed.sync_bn=false")
    at_once(2, trained, config, tmp_path / "two")  # the run itself holds the processes to equal statistics
    trained(config, tmp_path / "one")
    assert 1e-4 < apart(tmp_path / "one", tmp_path / "two") < 1


def differing(config: Config, folder: Path) -> str:
    """What a run says where one of its processes goes astray after the first epoch."""
    ordinary = train.Trainer._finish_epoch

    def astray(self: Any, *arguments: Any) -> None:
        ordinary(self, *arguments)
        if not ranks.leads():
            self.model.state_dict()["linear.bias"][0] += 1e-6

    train.Trainer._finish_epoch = astray  # type: ignore[method-assign]
    with pytest.raises(train.TrainingError) as caught:
        train.run(config, folder, quiet=True)
    return str(caught.value)


def test_weights_that_differ_end_a_run_before_they_are_saved(tmp_path: Path) -> None:
    said = at_once(2, differing, tiny("at", "--epochs=3"), tmp_path)
    assert said[0] == said[1]
    assert re.match(
        r"epoch 2: rank 1 has other values than rank 0 in model\..* the checkpoints before it", said[0]
    )
    assert final(tmp_path)["epoch"] == 2


class Clock:
    """Each look at it is two seconds after the one before."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 2.0
        return self.now


def astray_within(config: Config, folder: Path) -> str:
    """What a run says where one of its processes goes astray within its first epoch."""
    train.time = Clock()  # type: ignore[assignment]
    step = train.Step.__call__

    def astray(self: Any, batch: Any, *arguments: Any) -> Any:
        taken = step(self, batch, *arguments)
        if not ranks.leads():
            next(self.model.parameters()).data.view(-1)[0] += 1e-6
        return taken

    train.Step.__call__ = astray  # type: ignore[method-assign]
    with pytest.raises(train.TrainingError) as caught:
        train.run(config, folder, quiet=True)
    return str(caught.value)


def test_nor_is_what_differs_saved_within_an_epoch(tmp_path: Path) -> None:
    said = at_once(2, astray_within, tiny("at", "--keep.minutes=1e-9"), tmp_path)
    assert said[0] == said[1]
    assert re.match("epoch 1: rank 1 has other values than rank 0 in model", said[0])
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def collapsing(config: Config, folder: Path) -> int:
    """Train where the accuracies are those of a collapse in epoch 2, until the learning rate is a lower one; how
    often it has gone back."""
    rates: list[float] = []
    set_rate = train.set_learning_rate

    def noted(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        set_rate(optimizer, rate)

    def right(model: Any, batches: Any, eps: float, epoch: int, *more: Any) -> torch.Tensor:
        fell = epoch == 2 and rates[-1] == rates[0]
        return torch.tensor([90.0, 5.0, 80.0, 100.0] if fell else [90.0, 40.0, 45.0, 100.0])

    train.set_learning_rate, validation.right = noted, right  # type: ignore[assignment]
    train.run(config, folder, quiet=True)
    return sum(later < earlier for earlier, later in itertools.pairwise(rates))


def test_all_processes_go_back_where_a_guard_says_so(tmp_path: Path) -> None:
    config = tiny("trades", "--epochs=3", "--guard.action=roll_back", "--keep.minutes=1e-9")
    assert at_once(2, collapsing, config, tmp_path) == [1, 1]
    state = final(tmp_path)
    assert (state["epoch"], state["batch"], state["rollbacks"]) == (4, 0, 1)
    assert [record["epoch"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]


# torchrun --------------------------------------------------------------------------------------------------------
def started(*words: str, cwd: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *words], stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=environment, start_new_session=True
    )


def workers(folder: Path, count: int = 2) -> dict[int, int]:
    """Process numbers by rank, of the processes that work in the folder."""
    found: dict[int, int] = {}
    for place in Path("/proc").iterdir():
        try:
            inside = (place / "cwd").resolve() == folder.resolve()
            given = dict(v.split("=", 1) for v in (place / "environ").read_text().split("\0") if "=" in v)
        except (OSError, ValueError):
            continue
        if place.name.isdigit() and inside and "RANK" in given and "TORCHELASTIC_RUN_ID" in given:
            found[int(given["RANK"])] = int(place.name)
    assert len(found) == count
    return found


def wait_for_epoch(process: subprocess.Popen[str], number: int = 2) -> None:
    assert process.stdout is not None
    while f"epoch {number:3d}/" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_its_checkpoint_whole(tmp_path: Path, victim: int) -> None:
    process = started(*COMMAND, "--epochs=100000", "--out=run", cwd=tmp_path)
    wait_for_epoch(process)
    os.kill(workers(tmp_path)[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "another process of this run has ended" in err
    found = checkpoint.read_newest(tmp_path / "run/checkpoints", "last")
    assert found is not None
    done = found[1]["epoch"]
    subprocess.run([sys.executable, *COMMAND, f"--epochs={done}", "--out=run"], cwd=tmp_path, check=True)
    assert final(tmp_path / "run")["epoch"] == done + 1


def test_torchrun_starts_a_run_anew_from_its_last_checkpoint(tmp_path: Path) -> None:
    process = started("--max-restarts=1", *COMMAND, "--epochs=60", "--out=run", "--no-resume", cwd=tmp_path)
    wait_for_epoch(process)
    os.kill(workers(tmp_path)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resuming from last-" in out
    assert final(tmp_path / "run")["epoch"] == 61


def test_a_signal_to_torchrun_stops_all_processes_with_a_checkpoint(tmp_path: Path) -> None:
    process = started(*COMMAND, "--epochs=100000", "--out=run", cwd=tmp_path)
    wait_for_epoch(process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "mwpb-fast: stopped by SIGTERM; the same command goes on from here" in err
    assert time.monotonic() - began < 60
    assert final(tmp_path / "run")["epoch"] >= 2


def test_the_processes_share_the_evaluation(tmp_path: Path) -> None:
    words = [word for word in COMMAND if word != "--no-evaluate"] + ["--evaluation.attacks=natural,square"]
    process = started(*words, "--epochs=1", "--out=run", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("worst of these") == 1
    result = json.loads((tmp_path / "run/evaluation-best.json").read_text())
    subprocess.run([sys.executable, "-m", "mwpb_fast", "evaluate", "run"], cwd=tmp_path, check=True)
    again = json.loads((tmp_path / "run/evaluation-best.json").read_text())
    assert again["attacks"]["square"]["flags"] == result["attacks"]["square"]["flags"]


def test_the_processes_share_a_trust_report_and_the_runs_of_a_table(tmp_path: Path) -> None:
    subprocess.run([sys.executable, *COMMAND, "--epochs=1", "--out=run"], cwd=tmp_path, check=True)
    command, left_out = ["-m", "mwpb_fast"], "--without=aa,square"
    out, err = (process := started(*command, "trust", "run", "--subset=20", left_out, cwd=tmp_path)).communicate()
    assert process.returncode == 0, err
    assert out.count("# Trust report") == 1
    assert (tmp_path / "run/trust-best.json").exists()
    process = started(*command, "reproduce", "table1", *DIGITS, "--attacks=natural", "--out=out", cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("2 of 2 runs are complete.") == 1
    assert out.count(": training in ") == 2
