"""Options that would be read and then have no effect are refused, by every command that attacks a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluate_cases import untrained_state

from mwpb_fast import cli
from mwpb_fast.runs import checkpoint


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["w.pt", "--recipe", "digits.at", "--epochs", "3"], "--epochs has no effect here"),
        (["w.pt", "--recipe", "digits.at", "--precision.dtype", "bf16"], "--precision.dtype has no effect"),
        (["w.pt", "--recipe", "digits.at", "--budget.eps", "8/255"], "--budget.eps has no effect"),
        (["w.pt", "--recipe", "digits.at", "--which", "last"], "w.pt is a file"),
        (
            ["best.pt", "--recipe", "digits.mwpb_at", "--model.name", "resnet-18"],
            "--model.name is for other files",
        ),
        (["run", "--recipe", "digits.mwpb_at", "--data.name", "cifar10"], "--data.name is for other files"),
        (["best.pt", "--weights", "ema"], "--weights is for other files"),
        (
            ["w.pt", "--recipe", "digits.at", "--evaluation.validate_every", "2"],
            "validate_every has no effect here",
        ),
        (
            ["w.pt", "--recipe", "digits.at", "--precision.engine", "eager"],
            "--precision.engine has no effect here",
        ),
        (["w.pt", "--recipe", "digits.at", "--evaluation.attacks", "aa"], "--evaluation.attacks are one option"),
        (
            ["w.pt", "--recipe", "digits.at", "--device", "cpu", "--precision.device", "cpu"],
            "--device and --precision.device are one",
        ),
        (["best.pt", "--step-size", "1/255"], "--step-size has no effect on natural"),
        (["best.pt", "--eps", "1/255"], "--eps has no effect on natural"),
        (["best.pt", "--costly-subset", "5"], "--costly-subset has no effect on natural"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    words: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = untrained_state()
    checkpoint.save(tmp_path / "run" / "checkpoints", "best", 3, 0, state)
    torch.save(state, tmp_path / "best.pt")
    torch.save(state["model"], tmp_path / "w.pt")
    (tmp_path / "run" / "config.yaml").write_text("recipe: digits.mwpb_at\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *words, "--attacks", "natural"]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_seed_is_that_of_the_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(untrained_state()["model"], tmp_path / "w.pt")
    seeds = []
    monkeypatch.setattr(
        "mwpb_fast.evaluation.checkpoint.evaluate_run", lambda r, tell: seeds.append(r.seed) or {"warnings": {}}
    )
    monkeypatch.setattr("mwpb_fast.evaluation.score.format_table", lambda result: "")
    for words in ([], ["--seed", "5"]):
        assert cli.main(["evaluate", str(tmp_path / "w.pt"), "--recipe", "digits.at", *words]) == 0
    assert seeds == [0, 5]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("w.pt --recipe digits.at --evaluation.attacks aa", "--evaluation.attacks has no effect here"),
        ("w.pt --recipe digits.at --evaluation.eps 1/255", "--evaluation.eps has no effect here"),
        ("w.pt --recipe digits.at --evaluation.subset 5", "--evaluation.subset has no effect here"),
        ("w.pt --recipe digits.at --batch-size 5 --evaluation.batch_size 7", "are one option"),
        ("torch.nn:Identity --data-dir .", "--data-dir has no effect here: no data set is read"),
    ],
)
def test_options_that_verify_does_not_heed_are_refused(
    words: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(untrained_state()["model"], "w.pt")
    assert cli.main(["verify", "some.safetensors", *words.split()]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("trust w.pt --recipe digits.at --evaluation.attacks aa", "--evaluation.attacks has no effect here"),
        ("trust w.pt --recipe digits.at --evaluation.validate_every 2", "has no effect here"),
        ("evaluate torch.nn:Flatten --images torch:e --recipe digits.at --data.name svhn", "no data set is read"),
        ("evaluate torch.nn:Flatten --images torch:e --data-dir .", "no data set is read"),
        ("data list digits", "data list takes --dir alone, not NAME"),
        ("data list --encoded", "data list takes --dir alone, not --encoded"),
        ("data list --from .", "data list takes --dir alone, not --from"),
    ],
)
def test_other_commands_refuse_them_too(
    words: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(untrained_state()["model"], "w.pt")
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
