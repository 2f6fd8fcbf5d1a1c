"""Evaluation: what the result holds, resuming, warnings, refusals; AutoAttack against the bare package."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mwpb_fast import checkpoint
from mwpb_fast.attacks import autoattack as aa
from mwpb_fast.attacks import sharded
from mwpb_fast.attacks.score import wilson
from mwpb_fast.attacks.suite import Setting, check_ball, check_images, find_attack
from mwpb_fast.config import ConfigError, EvaluationConfig, PrecisionConfig, recipe, to_dict
from mwpb_fast.data import Config, load_split
from mwpb_fast.engine.frozen import EvaluationError
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.evaluate import assist, evaluate, evaluate_run, format_table
from mwpb_fast.models import build_model

package = pytest.importorskip("pyautoattack")
PRECISION = make_precision(PrecisionConfig(device="cpu", dtype="fp32"))
EPS = Fraction(8, 255)


class ShortAutoAttack(package.AutoAttack):
    """The standard version with fewer iterations: the bookkeeping is what most tests are about."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter = 10
        self.fab.n_iter, self.square.n_queries = 5, 60


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "AutoAttack", ShortAutoAttack)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def linear(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).eval()


def labelled(model: nn.Module, n: int = 40) -> tuple[Tensor, Tensor]:
    """Images of which the model gets all but every eighth right."""
    x = torch.rand(n, 3, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::8] = (y[::8] + 1) % 10
    return x, y


def config(*attacks: str, **options: Any) -> EvaluationConfig:
    return EvaluationConfig(attacks=attacks, eps=EPS, step_size=Fraction(1, 255), **options)


def run(model: nn.Module, images: Any, settings: EvaluationConfig, **options: Any) -> dict[str, Any]:
    return evaluate(model, images, settings, PRECISION, show=False, **options)


# the result -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
def test_result_says_everything_and_is_ordered(tmp_path: Path) -> None:
    model = linear()
    images = labelled(model)
    settings = config("natural", "pgd20", "pgd3", "cw20", "aa")
    result = run(model, images, settings, folder=tmp_path / "evaluation", about={"recipe": "mine"})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert result["eps"] == "8/255"
    assert Fraction(result["eps"]) == EPS
    assert result["eps_float"] == 8 / 255
    assert (result["step_size"], result["norm"], result["seed"], result["n"]) == ("1/255", "linf", 0, 40)
    assert (result["dtype"], result["preview"], result["recipe"]) == ("float32", False, "mine")
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["pyautoattack"] == package.__version__
    attacks = result["attacks"]
    assert list(attacks) == list(settings.attacks)
    assert attacks["natural"]["flags"] == ("0" + "1" * 7) * 5
    assert attacks["natural"]["accuracy"] == 87.5
    worst = result["worst"]
    assert worst["flags"] == "".join(map(min, zip(*(a["flags"] for a in attacks.values()), strict=True)))
    for attack in attacks.values():
        assert len(attack["flags"]) == 40
        assert attack["correct"] == attack["flags"].count("1")
        assert attack["accuracy"] == 100 * attack["correct"] / 40
        assert attack["interval"][0] <= attack["accuracy"] <= attack["interval"][1]
        assert worst["accuracy"] <= attack["accuracy"]
        assert attack["seconds"] >= 0
    after = attacks["aa"]["after"]
    assert list(after) == ["clean", *aa.COMPONENTS]
    assert sorted(after.values(), reverse=True) == list(after.values())
    assert (after["clean"], after["square"]) == (87.5, attacks["aa"]["accuracy"])
    assert attacks["aa"]["accuracy"] <= attacks["pgd20"]["accuracy"] < 87.5  # the aim of a linear model is known
    assert attacks["aa"]["deviations"] == []
    text = format_table(result)
    assert "87.50 %" in text
    assert "eps 8/255" in text
    assert "preview" not in text


def test_pgd_finds_what_a_linear_model_must_lose() -> None:
    model = linear(2)
    weight = (model[1].weight[0] - model[1].weight[1]).detach()
    x = 0.3 + 0.4 * torch.rand(256, 3, 4, 4)
    with torch.no_grad():
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
        logits = model(x)
    y = logits.argmax(1)
    gap = (logits[:, 0] - logits[:, 1]).abs()
    robust = gap > weight.abs().sum() * float(EPS)  # the least |gap| that no corner of the ball can turn
    assert 0 < robust.sum() < 256
    for name in ("pgd20", "cw20"):
        flags = run(model, (x, y), config(name))["attacks"][name]["flags"]
        assert flags == sharded.bits(robust)


def test_wilson_interval() -> None:
    # p = 1/2, n = 4, z = 2: centre 1/2, half 2 / (1 + 1) * sqrt(1/16 + 4/64) = sqrt(1/8)
    assert wilson(2, 4, z=2.0) == pytest.approx((0.5 - 0.125**0.5, 0.5 + 0.125**0.5))
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1


def test_radius_zero_changes_nothing() -> None:
    model = linear()
    images = labelled(model)
    settings = EvaluationConfig(attacks=("natural", "pgd5"), eps=Fraction(0), step_size=Fraction(1, 255))
    attacks = run(model, images, settings)["attacks"]
    assert attacks["pgd5"]["flags"] == attacks["natural"]["flags"]


def test_subset_is_a_stratified_preview() -> None:
    model = linear()
    x, y = torch.rand(100, 3, 4, 4), torch.arange(10).repeat_interleave(10)
    result = run(model, (x, y), config("natural", subset=20))
    assert result["preview"] is True
    assert result["n"] == len(result["attacks"]["natural"]["flags"]) == 20
    assert "preview" in format_table(result)
    assert run(model, (x, y), config("natural", subset=100))["preview"] is False


def test_model_is_left_as_it_was() -> None:
    model = build_model("smallresnet-4", num_classes=10).eval()
    next(model.parameters()).requires_grad_(False)
    before = [(p.clone(), p.requires_grad) for p in model.parameters()]
    tf32 = torch.backends.cudnn.conv.fp32_precision
    images = torch.rand(6, 3, 8, 8), torch.arange(6)
    state = torch.random.get_rng_state()
    run(model, images, config("natural", "pgd2", "cw2"))
    for (value, wants), p in zip(before, model.parameters(), strict=True):
        assert torch.equal(value, p)
        assert p.requires_grad is wants
        assert p.grad is None
    assert torch.backends.cudnn.conv.fp32_precision == tf32
    assert torch.equal(state, torch.random.get_rng_state())


# shards ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("short")
def test_killed_evaluation_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "SHARD", 10)
    model = linear()
    images, settings = labelled(model), config("natural", "pgd3", "aa")
    whole = run(model, images, settings)
    folder = tmp_path / "evaluation"
    passes, kills = 0, 0

    def bomb() -> None:
        nonlocal passes
        passes += 1
        if passes in (2, 50, 400, 900):
            raise Killed

    while kills < 10:
        try:
            result = run(model, images, settings, folder=folder, tick=bomb)
            break
        except Killed:
            kills += 1
            assert not (tmp_path / "evaluation.json").exists()
    assert kills == 4
    assert flags_of(result) == flags_of(whole)
    assert result["attacks"]["aa"]["after"] == whole["attacks"]["aa"]["after"]
    assert sorted(p.name.split("-")[0] for p in folder.iterdir()) == ["aa"] * 4 + ["natural"] * 4 + ["pgd3"] * 4
    # a finished shard is not done again; a lost, damaged or foreign one is
    files = sorted(folder.glob("aa-*.json"))
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    files[1].write_text(files[1].read_text()[:40])
    files[2].write_text(files[2].read_text().replace('"shard": 2', '"shard": 1'))
    assert flags_of(run(model, images, settings, folder=folder)) == flags_of(whole)
    assert [a == b.stat().st_mtime_ns for a, b in zip(times, files, strict=True)] == [False, False, False, True]


def flags_of(result: dict[str, Any]) -> dict[str, str]:
    return {name: attack["flags"] for name, attack in result["attacks"].items()}


def test_shards_of_another_model_radius_or_seed_are_not_taken(tmp_path: Path) -> None:
    model, folder = linear(), tmp_path / "e"
    images = labelled(model)
    run(model, images, config("pgd2"), folder=folder)
    run(model, images, config("pgd2"), folder=folder, seed=1)
    run(model, images, EvaluationConfig(attacks=("pgd2",), eps=2 * EPS, step_size=EPS), folder=folder)
    run(model, (images[0].flip(0), images[1]), config("pgd2"), folder=folder)
    with torch.no_grad():
        model[1].bias += 1
    run(model, images, config("pgd2"), folder=folder)
    assert len(list(folder.iterdir())) == 5


def test_shards_are_even_and_at_most_250() -> None:
    for n, sizes in ((1, [1]), (250, [250]), (251, [126, 125]), (360, [180, 180]), (10_000, [250] * 40)):
        parts = sharded.split(torch.arange(n))
        assert [len(part) for part in parts] == sizes
        assert torch.equal(torch.cat(parts), torch.arange(n))


# AutoAttack -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
def test_flags_and_images_are_those_of_the_bare_package() -> None:
    model = linear()
    model.requires_grad_(False)
    x, y = labelled(model)
    result = aa.autoattack(model, x, y, eps=0.02, seed=3)
    plain = package.AutoAttack(model, eps=0.02, seed=3, version="standard")
    logging.disable(logging.CRITICAL)
    try:
        x_adv, labels = plain.run_standard_evaluation(x, y, batch_size=250)
    finally:
        logging.disable(logging.NOTSET)
    assert torch.equal(result.correct, labels == y)
    assert torch.equal(result.x_adv, x_adv)
    assert 0 < result.correct.sum() < result.after["clean"].sum()


def test_it_is_the_standard_version(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Spy(package.AutoAttack):
        def run_standard_evaluation(self, x: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            made.append((self, list(self.attacks_to_run), len(x)))
            return x, y

    monkeypatch.setattr(package, "AutoAttack", Spy)
    model = linear()
    x, y = labelled(model)
    aa.autoattack(model, x, y, eps=8 / 255)
    assert [run for _, run, _ in made] == [["apgd-ce"], ["apgd-t"], ["fab-t"], ["square"]]
    one = made[0][0]
    assert (one.epsilon, one.norm, one.version) == (8 / 255, "Linf", "standard")
    for apgd in (one.apgd, one.apgd_targeted):
        assert (apgd.n_iter, apgd.n_restarts, apgd.thr_decr, apgd.eot_iter) == (100, 1, 0.75, 1)
    fab = one.fab
    assert (one.apgd_targeted.n_target_classes, fab.n_target_classes, fab.n_restarts) == (9, 9, 1)
    assert (fab.n_iter, fab.alpha_max, fab.eta, fab.beta) == (100, 0.1, 1.05, 0.9)
    square = one.square
    assert (square.n_queries, square.p_init, square.rescale_schedule, square.n_restarts) == (5000, 0.8, False, 1)


@pytest.mark.usefixtures("short")
def test_nothing_is_left_in_the_process(caplog: pytest.LogCaptureFixture) -> None:
    model = linear()
    model.requires_grad_(False)
    x, y = labelled(model, 8)
    logger = logging.getLogger("auto-attack")
    before = (logger.level, logger.propagate, logger.handlers[:])
    during: list[Any] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            during.append(sys.gettrace())
            return model(x)

    def tracer(frame: Any, event: str, argument: Any) -> None:
        return None

    state, outer = torch.random.get_rng_state(), sys.gettrace()
    caplog.set_level(logging.DEBUG)
    sys.settrace(tracer)
    try:
        aa.autoattack(Watch().eval(), x, y, eps=0.02)
        after = sys.gettrace()
    finally:
        sys.settrace(outer)
    assert after is tracer
    assert during.count(tracer) > 0.9 * len(during)  # only the dynamic check itself puts its own in place
    assert torch.equal(state, torch.random.get_rng_state())
    assert (logger.level, logger.propagate, logger.handlers) == before
    assert not [record for record in caplog.records if record.name == "auto-attack"]


class Odd(nn.Module):
    """A linear model with one of the peculiarities that AutoAttack warns of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model, self.kind = linear(), kind
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if self.kind == "softmax_output":
            return logits.softmax(1)
        if self.kind == "randomized":
            return logits + 0.1 * torch.randn_like(logits)
        if self.kind == "zero_gradients":
            return logits.detach() + 0 * x.sum()
        if self.kind == "dynamic":
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                torch.autograd.grad(self.model(leaf).sum(), leaf)
        return logits


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", ["softmax_output", "randomized", "zero_gradients", "dynamic"])
def test_warnings_are_captured_and_do_not_stick(kind: str) -> None:
    model = Odd(kind)
    images = labelled(model.model, 8)
    result = run(model, images, config("aa"))
    assert kind in result["warnings"]
    assert result["warnings"] == result["attacks"]["aa"]["warnings"]
    assert f"warning ({kind})" in format_table(result)
    assert kind not in run(linear(), images, config("aa"))["warnings"]


def test_square_is_judged_on_the_whole_set() -> None:
    found = {"clean": 0.9, "apgd-ce": 0.5, "apgd-t": 0.5, "fab-t": 0.5, "square": 0.497}
    assert "0.30 %" in aa.square_warning(found)["square"]
    assert aa.square_warning(found | {"square": 0.499}) == {}
    assert aa.classify(["it seems to be something new"]) == {"other": "it seems to be something new"}


@pytest.mark.usefixtures("short")
def test_few_classes_are_attacked_on_all_others_or_refused() -> None:
    model = linear(5)
    x = torch.rand(6, 3, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = run(model, (x, y), config("aa"))["attacks"]["aa"]
    assert attack["deviations"] == ["4 target classes instead of 9"]
    with pytest.raises(ConfigError, match="at least 4 classes, the model has 3"):
        run(linear(3), (x, y % 3), config("aa"))


@pytest.mark.usefixtures("short")
def test_nothing_right_needs_no_attack() -> None:
    model = linear()
    x, y = labelled(model, 8)
    assert run(model, (x, (y + 5) % 10), config("aa"))["attacks"]["aa"]["accuracy"] <= 12.5


def test_missing_pyautoattack_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model = linear()
    with pytest.raises(ConfigError, match=r"mwpb-fast\[eval\]") as error:
        run(model, labelled(model), config("natural", "aa"))
    assert "\n" not in str(error.value)


# refusals -------------------------------------------------------------------------------------------------------


def test_train_mode_is_refused() -> None:
    model = build_model("smallresnet-4", num_classes=10).eval()
    model.layer2[0].bn1.train()
    with pytest.raises(EvaluationError, match=r"layer2\.0\.bn1 is in train mode"):
        run(model, (torch.rand(2, 3, 8, 8), torch.arange(2)), config("natural"))


@pytest.mark.parametrize("change", ["double", "bfloat16"])
def test_other_than_float32_weights_are_refused(change: str) -> None:
    with pytest.raises(EvaluationError, match="float32"):
        run(getattr(linear(), change)(), (torch.rand(2, 3, 4, 4), torch.arange(2)), config("natural"))


def test_images_outside_the_pixel_range_are_refused() -> None:
    x = torch.rand(2, 3, 4, 4)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = -5e-7, 1 + 5e-7
    clamped = check_images(x)
    assert (clamped.min(), clamped.max()) == (0, 1)
    for bad in (-1e-5, 1.00001, float("nan"), float("inf")):
        x[0, 0, 0, 0] = bad
        with pytest.raises(EvaluationError, match=r"\[0, 1\]"):
            run(linear(), (x, torch.arange(2)), config("natural"))
    with pytest.raises(EvaluationError, match="float"):
        check_images(torch.zeros(2, 3, 4, dtype=torch.long))


def test_labels_beyond_the_models_classes_are_refused() -> None:
    with pytest.raises(EvaluationError, match="labels reach 12"):
        run(linear(), (torch.rand(2, 3, 4, 4), torch.tensor([3, 12])), config("natural"))


@pytest.mark.parametrize("name", ["pgd", "pgd0", "cw-20", "fgsm", "aa2", "PGD20", ""])
def test_unknown_attacks_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no attack"):
        find_attack(name)


def test_ball_is_checked_on_every_image() -> None:
    setting = Setting(EPS, EPS, PRECISION)
    x = torch.full((3, 1, 2, 2), 0.5)
    check_ball(x + float(EPS), x, setting)
    for bad in (float(EPS) + 2e-6, float("nan")):
        moved = x.clone()
        moved[2, 0, 1, 1] += bad
        with pytest.raises(EvaluationError, match="moved an image"):
            check_ball(moved, x, setting)
    edge = torch.zeros(1, 1, 2, 2)
    with pytest.raises(EvaluationError, match="left"):
        check_ball(edge - 1e-7, edge, setting)


# runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a best and a last checkpoint of an untrained model, the latter with averaged weights."""
    settings = recipe("digits.mwpb_at")
    model = build_model(settings.model.name, num_classes=10, channels=1)
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state = {
        "config": to_dict(settings),
        "classes": [str(digit) for digit in range(10)],
        "channels": 1,
        "normalize": None,
        "epoch": 3,
        "model": model.state_dict(),
    }
    checkpoint.save(tmp_path / "checkpoints", "best", 3, 0, state)
    checkpoint.save(tmp_path / "checkpoints", "last", 4, 7, state | {"model": zeros, "ema": model.state_dict()})
    return tmp_path


def test_run_folder_is_evaluated(folder: Path) -> None:
    best = evaluate_run(folder, config("natural", "pgd2", subset=50), show=False)
    assert json.loads((folder / "evaluation-best.json").read_text()) == best
    assert (best["recipe"], best["epoch"], best["which"]) == ("digits.mwpb_at", 3, "best")
    assert best["checkpoint"] == "best-00003-0000000.pt"
    assert best["sha256"] in (folder / "checkpoints" / "best-00003-0000000.pt.sha256").read_text()
    last = evaluate_run(folder, config("natural", "pgd2", subset=50), "last", show=False)
    assert last["checkpoint"] == "last-00004-0000007.pt"
    assert last["attacks"]["natural"]["flags"] == best["attacks"]["natural"]["flags"]  # the averaged weights
    file = folder / "checkpoints" / "best-00003-0000000.pt"
    single = evaluate_run(file, config("natural", "pgd2", subset=50), show=False)
    assert flags_of(single) == flags_of(best)
    assert (file.parent / "evaluation-best-00003-0000000.json").exists()


def test_bare_weights_need_a_configuration(folder: Path) -> None:
    state = checkpoint.read(folder / "checkpoints" / "best-00003-0000000.pt")
    torch.save({"state_dict": state["model"]}, folder / "weights.pt")
    with pytest.raises(checkpoint.CheckpointError, match="which model"):
        evaluate_run(folder / "weights.pt", config("natural"), show=False)
    given = recipe("digits.mwpb_at")
    bare = evaluate_run(folder / "weights.pt", config("natural"), config=given, show=False)
    assert flags_of(bare) == flags_of(evaluate_run(folder, config("natural"), show=False))
    assert bare["n"] == len(load_split(Config(name="digits"), "test"))


def test_missing_and_foreign_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="no best checkpoint"):
        evaluate_run(tmp_path / "checkpoints", config("natural"))
    with pytest.raises(checkpoint.CheckpointError, match=r"nowhere\.pt"):
        evaluate_run(tmp_path / "nowhere.pt", config("natural"))
    (folder / "junk.pt").write_bytes(b"junk")
    with pytest.raises(checkpoint.CheckpointError, match=r"junk\.pt"):
        evaluate_run(folder / "junk.pt", config("natural"))
    with pytest.raises(ConfigError, match="no attack"):
        evaluate_run(folder, config("fgsm"))


@pytest.mark.usefixtures("short")
def test_helper_does_its_part_and_leaves_when_orphaned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = EvaluationConfig(attacks=("natural", "aa"), eps=Fraction(1))
    settings = replace(recipe("digits.mwpb_at"), evaluation=asked)
    job = {"target": str(folder), "which": "best", "data_dir": None, "device": None, "seed": 0}
    words = json.dumps(job | {"config": to_dict(settings), "part": 1, "parts": 2})
    monkeypatch.setattr(sys, "argv", ["-c", words, "1"])
    with pytest.raises(SystemExit):
        assist()
    assert not (folder / "evaluation-best").exists()
    monkeypatch.setattr(sys, "argv", ["-c", words, str(os.getppid())])
    assist()
    (name,) = [path.name for path in (folder / "evaluation-best").iterdir()]
    assert name.startswith("aa-")
    assert name.endswith("-00001.json")


def test_processes_share_the_work_and_the_flags_are_the_same(folder: Path) -> None:
    # an untrained model: few images are right and fewer survive, so that the whole attack is short
    settings = EvaluationConfig(attacks=("aa",), eps=Fraction(1), step_size=EPS)
    shared = evaluate_run(folder, settings, processes=2, show=False)
    files = {p.name: p.read_text() for p in (folder / "evaluation-best").iterdir()}
    assert len(files) == 2
    for path in (folder / "evaluation-best").iterdir():
        path.unlink()
    alone = evaluate_run(folder, settings, processes=1, show=False)
    assert flags_of(shared) == flags_of(alone)
