"""The commands from end to end: training, evaluating, drawing, and a run that is stopped."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import TINY, one_error_line, run

from mwpb_fast import cli
from mwpb_fast.cli.train import unreached
from mwpb_fast.options import configure


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A tiny run on digits by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    attacks = ["--evaluation.attacks", "natural,pgd20", "--evaluation.subset", "40"]
    done = run("train", "digits.mwpb_at", *TINY, *attacks, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "digits.mwpb_at", done


def test_train_shows_epochs_and_accuracies_and_draws(trained: tuple[Path, Any]) -> None:
    folder, done = trained
    assert done.stdout.startswith(
        "training digits.mwpb_at: smallresnet-16 on 128 images of digits, on cpu, for 2 epochs (1 of them "
        "warm-up), into runs/digits.mwpb_at\n"
    )
    assert done.stdout.endswith("\nreport: mwpb-fast report runs/digits.mwpb_at\n")
    assert re.search(r"epoch +1/2 warmup ", done.stdout)
    assert re.search(r"epoch +2/2 main ", done.stdout)
    for line in ("natural ", "pgd20 ", "radii of "):
        assert re.search(rf"^{line}", done.stdout, re.MULTILINE)
    for file in ("config.yaml", "metrics.jsonl", "radii.json", "evaluation-best.json"):
        assert (folder / file).stat().st_size > 0
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["epochs"], saved["data"]["subset"], saved["budget"]["eps"]) == (2, 128, "32/255")
    pytest.importorskip("matplotlib")
    assert (folder / "curves.png").exists()
    assert (folder / "radii.png").exists()


def test_saved_configuration_repeats_the_run(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    words = ["train", "--config", str(folder / "config.yaml"), "--out", "again", "--no-evaluate", "--quiet"]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "config.yaml").read_text() == (folder / "config.yaml").read_text()
    assert json.loads((tmp_path / "again" / "radii.json").read_text()) == json.loads(
        (folder / "radii.json").read_text()
    )


def test_folder_of_another_run_is_refused(trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = trained
    words = ["train", "digits.mwpb_at", *TINY, "--out", str(folder), "--optim.lr", "0.5", "--no-evaluate"]
    assert cli.main(words) == 2
    assert "--no-resume" in one_error_line(capsys.readouterr().err)


def test_evaluate_a_run_and_a_checkpoint(trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = trained
    words = ["evaluate", str(folder), "--attacks", "natural,pgd2", "--eps", "4/255", "--subset", "30"]
    assert cli.main(words) == 0
    assert "4/255" in capsys.readouterr().out
    result = json.loads((folder / "evaluation-best.json").read_text())
    assert (result["eps"], result["n"], result["preview"]) == ("4/255", 30, True)
    assert set(result["attacks"]) == {"natural", "pgd2"}
    checkpoint = next((folder / "checkpoints").glob("best-*.pt"))
    assert cli.main(["evaluate", str(checkpoint), "--attacks", "natural", "--subset", "30"]) == 0
    assert "natural" in capsys.readouterr().out


def test_plot_draws_again(trained: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder, _ = trained
    assert cli.main(["plot", str(folder), str(folder), "--out", str(tmp_path / "both")]) == 0
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"curves.png", "radii.png"}


def test_report_looks_at_the_images(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 24
    assert "Margin against radius" in page
    assert "No images" not in page
    for checkpoint in (folder / "checkpoints").glob("best-*.pt"):
        checkpoint.write_bytes(b"cut short")
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/png" not in page
    assert re.search("No images: [^<]*damaged: its SHA-256", page)


def test_warmup_that_never_ends_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "digits.mwpb_at", *TINY, "--warmup_epochs", "2", "--optim.drops", "20,26", "--no-evaluate"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the 2 epochs will have budget margin" in line
    assert "the learning rate will not drop in epoch 20 and 26, beyond the last of 2" in line
    assert line.endswith("--warmup_epochs 1 --optim.drops 2")


def test_the_parts_of_a_schedule_that_never_come_are_named() -> None:
    def said(*words: str) -> str:
        return unreached(configure("digits.mwpb_at", {}, words))

    assert said() == said("--epochs=0") == said("--epochs=26") == ""
    assert said("--epochs=25") == (
        "the learning rate will not drop in epoch 26, beyond the last of 25; --epochs does not scale that: in "
        "proportion it is --optim.drops 17,22"
    )
    assert "drop" not in said("--epochs=10", "--optim.drops=[]")
    assert said("--epochs=1").endswith("in proportion it is --warmup_epochs 0 --optim.drops []")


def test_sigterm_in_training_leaves_with_143_and_goes_on(tmp_path: Path) -> None:
    words = ["train", "digits.mwpb_at", "--epochs", "500", "--out", "run", "--no-evaluate"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mwpb_fast", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("training ")
    assert process.stdout.readline().startswith("epoch ")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143
    assert "stopped by SIGTERM" in err
    assert any((tmp_path / "run" / "checkpoints").glob("last-*.pt"))
