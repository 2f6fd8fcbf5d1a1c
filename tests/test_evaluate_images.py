"""Adversarial images: saved, taken again, and checked by `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import config, flags_of, labelled, linear, one_line, untrained_state
from evaluate_cases import one_thread as one_thread  # an autouse fixture
from evaluate_cases import short as short  # a fixture
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mwpb_fast import cli
from mwpb_fast.evaluation.adversaries import packed, read, unpacked
from mwpb_fast.evaluation.evaluate import evaluate
from mwpb_fast.runs import checkpoint


def changed(file: Path, **tensors: torch.Tensor) -> None:
    with safe_open(file, framework="pt") as old:
        about = old.metadata()
    save_file(load_file(file) | tensors, file, metadata=about)


@pytest.mark.usefixtures("short")
def test_the_images_are_those_that_were_judged(tmp_path: Path) -> None:
    model = linear()
    x, y = labelled(model, 12)
    attacks = ("natural", "fgsm@1", "pgd3x2@1/10", "pgd2-weighted", "apgd-ce@1/10", "square", "spsa1")
    asked: dict[str, Any] = {"folder": tmp_path / "kept", "show": False}
    before = evaluate(model, (x, y), config(*attacks, costly_subset=2), **asked)
    result = evaluate(model, (x, y), config(*attacks, costly_subset=2), save_images=True, **asked)
    assert flags_of(result) == flags_of(before)
    assert "saved" not in result["attacks"]["natural"]
    files = {
        name: tmp_path / "kept" / entry["saved"] for name, entry in result["attacks"].items() if "saved" in entry
    }
    assert sorted(files) == sorted(attacks[1:])
    assert sorted(files.values()) == sorted((tmp_path / "kept").glob("*.safetensors"))
    for name, file in files.items():
        saved, about = read(file)
        entry = result["attacks"][name]
        index = torch.tensor(entry.get("images", range(12)))
        assert torch.equal(saved["index"], index)
        assert torch.equal(saved["x"], x[index])
        assert torch.equal(saved["y"], y[index])
        with torch.no_grad():
            now = model(saved["x_adv"]).argmax(1)
        assert torch.equal(now, saved["predicted"])
        assert "".join("01"[bool(right)] for right in now == saved["y"]) == entry["flags"]
        assert ((saved["x_adv"] - saved["x"]).abs().flatten(1).amax(1) <= saved["radius"] + 1e-6).all()
        assert (about["attack"], about["eps"]) == (name.partition("@")[0], "" if "w" in name else entry["eps"])
        assert (about["uint8_exact"] == "true") == (name == "fgsm@1")
    stamps = {file: file.stat().st_mtime_ns for file in files.values()}
    again = evaluate(model, (x, y), config(*attacks, costly_subset=2), save_images=True, **asked)
    assert again["attacks"] == result["attacks"]
    assert stamps == {file: file.stat().st_mtime_ns for file in files.values()}


def test_whole_levels_are_kept_as_such() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(packed(unpacked(levels)), levels)
    assert packed(unpacked(levels) + 1e-4).dtype == torch.float32


def test_images_need_a_folder() -> None:
    model = linear()
    assert "folder" in one_line(lambda: evaluate(model, labelled(model), config("fgsm"), save_images=True))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The images of PGD on 50 digits."""
    checkpoint.save(tmp_path / "checkpoints", "best", 3, 0, untrained_state())
    words = ["--attacks", "pgd2@1/4:1/8", "--subset", "50", "--save-images", "--device", "cpu"]
    cli.main(["evaluate", "--recipe", "digits.at", str(next((tmp_path / "checkpoints").glob("*.pt"))), *words])
    (file,) = tmp_path.rglob("*.safetensors")
    return file


def verified(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    status = cli.main(["verify", str(file), *words, "--device", "cpu"])
    return status, capsys.readouterr().out.splitlines()


def test_what_verify_says(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(next(saved.parents[1].glob("*.pt")))
    capsys.readouterr()
    status, lines = verified(saved, capsys, target)
    assert (status, [line.partition(":")[0] for line in lines]) == (0, ["ok", "ok", "ok", "note"])
    assert lines[0] == "ok: 50 of 50 images are in [0, 1] and within linf 1/4"
    assert lines[1] == "ok: 50 of 50 natural images are the test set's"
    content = load_file(saved)

    def wrong(**tensors: torch.Tensor) -> list[str]:
        changed(saved, **tensors)
        status, lines = verified(saved, capsys, target)
        changed(saved, **content)
        assert status == 1
        return [line for line in lines if line.startswith("wrong")]

    moved = content["x_adv"].clone()
    moved[3], moved[7] = (moved[3] + 0.5).clamp(max=1), torch.nan
    first, second, *_ = wrong(x_adv=moved, index=content["index"].roll(1))
    assert "48 of 50 images are in" in first
    assert "0 of 50 natural images" in second
    other = (content["predicted"] == content["y"]).long() + content["y"]
    first, second = wrong(index=content["index"] + 10**6, predicted=other)
    assert "not of this test set" in first
    assert "the model gets" in second


def test_files_of_another_kind_are_refused_in_one_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    target = str(next(saved.parents[1].glob("*.pt")))
    for name, reason in (
        ("other", "no adversarial images"),
        ("broken", "cannot be read"),
        ("none", "cannot be read"),
    ):
        assert cli.main(["verify", str(tmp_path / f"{name}.safetensors"), target]) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert said.count("\n") == 1
    assert cli.main(["verify", str(saved), target, "--eps", "8/255"]) == 2


def test_verify_heeds_a_recipes_batch_size_and_data(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model in code, too, whose images are then held to the recipe's."""
    sizes: list[int] = []

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.training, self.weight = False, torch.randn(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return x.flatten(1) @ self.weight

    monkeypatch.setattr("torch.nn.Mine", Net, raising=False)
    words = ["torch.nn:Mine", "--recipe", "digits.at", "--evaluation.batch_size", "20"]
    _, lines = verified(saved, capsys, *words)
    assert "ok: 50 of 50 natural images are the test set's" in lines
    assert {20, 10} <= set(sizes)
    assert max(sizes) == 20


def test_the_images_of_a_randomised_model_are_checked_by_a_draw(tmp_path: Path) -> None:
    from evaluate_cases import Wrap

    from mwpb_fast.evaluation.request import Request
    from mwpb_fast.evaluation.verify import verify

    torch.manual_seed(0)
    model = linear()
    noisy = Wrap(model, lambda m, x: m(x + 0.3 * torch.randn_like(x)))
    evaluate(noisy, labelled(model), config("pgd2-eot2"), folder=tmp_path / "e", save_images=True, show=False)
    (file,) = (tmp_path / "e").glob("*.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.mine", noisy, raising=False)
        checks = verify(file, Request(Path("torch.nn:mine"), device="cpu"))
    assert [holds for holds, _ in checks] == [True, None, None]
    assert "the model, whose predictions are random, gets" in checks[1][1]
