"""Files of an earlier version, as users have them: they load, a run goes on, is evaluated and drawn.

frozen/ was written by version 0.1.0 and stays as it is (sums.txt); a format that changes is read in its old form
too, and a release adds files of its own. It holds a run on digits (smallresnet-8, TRADES with the margin budget)
that was stopped after 2 of the 7 batches of epoch 3, with the evaluation of its best checkpoint, and the YAML file
that it was started with.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mwpb_fast.cli import main

FROZEN = Path(__file__).with_name("frozen")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the frozen run, as the commands write into it."""
    return Path(shutil.copytree(FROZEN / "run", tmp_path / "run"))


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluation(run: Path) -> dict[str, Any]:
    (path,) = run.glob("evaluation-best.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def accuracies(run: Path) -> dict[str, float]:
    return {name: attack["accuracy"] for name, attack in evaluation(run)["attacks"].items()}


def newest(run: Path, kind: str) -> dict[str, Any]:
    path = sorted(run.glob(f"checkpoints/{kind}-*.pt"))[-1]
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def test_none_of_them_has_changed() -> None:
    sums = dict(reversed(line.split("  ")) for line in (FROZEN / "sums.txt").read_text().splitlines())
    there = {path.relative_to(FROZEN).as_posix(): path for path in FROZEN.rglob("*") if path.is_file()}
    del there["sums.txt"]
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()} == sums


def test_a_run_goes_on(run: Path) -> None:
    """To the end of the epoch in which it was stopped, and for one more."""
    before, stopped = records(run), newest(run, "last")
    assert (stopped["epoch"], stopped["batch"]) == (3, 2)
    options = ["--config", str(run / "config.yaml"), "--epochs=4", "--no-evaluate", "--quiet", f"--out={run}"]
    assert main(["train", *options]) == 0
    after = records(run)
    assert after[:2] == before
    assert [r["epoch"] for r in after] == [1, 2, 3, 4]
    assert [r["phase"] for r in after] == ["warmup", "main", "main", "main"]
    done = [r["loss"] for r in after]
    assert all(math.isfinite(loss) for loss in done)
    assert done[3] < done[0]  # it goes on from what had been learnt
    assert after[3]["natural"] > 30
    radii = json.loads((run / "radii.json").read_text())
    assert radii["epoch"] == 4
    assert len(radii["radii"]) == 500


def test_what_the_interrupted_epoch_had_done_is_kept(run: Path) -> None:
    """The mean over the epoch is that of the two losses on file and of five more, which the newest epoch's are."""
    stopped = newest(run, "last")
    options = ["--config", str(run / "config.yaml"), "--no-evaluate", "--quiet", f"--out={run}"]
    assert main(["train", *options]) == 0
    (record,) = [r for r in records(run) if r["epoch"] == 3]
    first = stopped["trace"][:2, 0].double()
    rest = (record["loss"] * 7 - first.sum().item()) / 5
    assert 0.5 < rest < 2.5, "the losses of the five steps after the stop"
    assert newest(run, "last")["epoch"] == 4
    # the first two steps are of a version that kept neither norms nor quantiles: the rest have them
    assert 0 < record["norm_mean"] <= record["norm_max"] < math.inf
    assert record["radius_min"] <= record["radius_p05"] <= record["radius_p50"] <= record["radius_max"]
    assert "clipped" not in record


def test_the_frozen_evaluation_is_found_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its shards or anew; anew, roundings of another processor may turn an image or two."""
    expected = accuracies(run)
    assert set(expected) == {"natural", "pgd3", "cw3"}
    assert main(["evaluate", str(run)]) == 0
    actual = accuracies(run)
    assert set(actual) == set(expected)
    assert all(abs(actual[name] - value) <= 5.0 for name, value in expected.items())
    assert evaluation(run)["worst"]["accuracy"] <= min(actual.values())
    assert "worst of these" in capsys.readouterr().out


def test_it_is_evaluated_without_its_shards(run: Path) -> None:
    expected = accuracies(run)
    shutil.rmtree(run / "evaluation-best")
    (run / "evaluation-best.json").unlink()
    assert main(["evaluate", str(run), "--attacks", "natural,pgd3,cw3,pgd3x2"]) == 0
    actual = accuracies(run)
    assert all(abs(actual[name] - value) <= 5.0 for name, value in expected.items())
    assert actual["pgd3x2"] <= actual["pgd3"]


def test_the_last_checkpoint_alone(run: Path) -> None:
    (path,) = run.glob("checkpoints/last-*.pt")
    assert main(["evaluate", str(path), "--attacks", "natural", "--subset", "40"]) == 0


def test_a_damaged_checkpoint_is_noticed_by_its_sidecar(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = run.glob("checkpoints/best-*.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["evaluate", str(run)]) == 2
    assert path.name in capsys.readouterr().err


def test_it_is_drawn(run: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", str(run), "--out", str(run / "drawn")]) == 0
    assert {path.name for path in (run / "drawn").iterdir()} >= {"curves.png", "radii.png"}


def test_the_yaml_file_still_means_what_it_meant(tmp_path: Path) -> None:
    """It resolves to the configuration of the run that was started with it; later options have their defaults."""
    import yaml

    options = ["--config", str(FROZEN / "override.yaml"), "--no-evaluate", "--quiet", "--epochs=0"]
    assert main(["train", "digits.mwpb_at", *options, f"--out={tmp_path}"]) == 0
    now = yaml.safe_load((tmp_path / "config.yaml").read_text())
    then = yaml.safe_load((FROZEN / "run" / "config.yaml").read_text())

    def kept(old: Any, new: Any) -> bool:
        if isinstance(old, dict):
            return all(key in new and kept(value, new[key]) for key, value in old.items())
        return bool(old == new)

    assert then.pop("epochs") == 3
    # since then a trial may decide; where there are no graphs, as on a CPU, auto is false
    assert (then["precision"].pop("capture"), now["precision"]["capture"]) == (False, "auto")
    assert kept(then, now)
