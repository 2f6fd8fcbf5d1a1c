"""AutoAttack against the bare package, its warnings, and what an evaluation refuses."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from evaluate_cases import (
    EPS,
    PRECISION,
    config,
    labelled,
    linear,
    one_thread,  # noqa: F401  # an autouse fixture
    package,
    run,
    short,  # noqa: F401  # a fixture
)
from torch import Tensor, nn

from mwpb_fast.config import ConfigError
from mwpb_fast.evaluation import autoattack as aa
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.contract import AttackSetting, check_ball, check_images
from mwpb_fast.evaluation.model_checks import EvaluationError
from mwpb_fast.evaluation.score import format_table
from mwpb_fast.models import build_model


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
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes_are_attacked_on_all_others_by_the_parts_that_exist(classes: int) -> None:
    model = linear(classes)
    x = torch.rand(6, 3, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = run(model, (x, y), config("aa@1/4"))["attacks"]["aa@1/4"]
    targets = f"{classes - 1} target class{'es' * (classes > 2)} instead of 9"
    without = ["without apgd-t, whose loss needs 4 classes"] * (classes < 4)
    assert attack["deviations"] == sorted([targets, *without])
    assert list(attack["after"]) == ["clean", "apgd-ce", *["apgd-t"] * (classes > 3), "fab-t", "square"]
    assert attack["accuracy"] < 50
    if without:
        with pytest.raises(ConfigError, match=f"apgd-t needs at least 4 classes, the model has {classes}"):
            run(model, (x, y), config("apgd-t"))


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
    model = build_model("smallresnet-8", num_classes=10).eval()
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


@pytest.mark.parametrize("name", ["pgd", "pgd0", "cw-20", "aa2", "PGD20", "spsa0", "spsa8x2", "fab20", ""])
def test_unknown_attacks_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no attack"):
        find_attack(name)


def test_ball_is_checked_on_every_image() -> None:
    setting = AttackSetting(EPS, EPS, PRECISION)
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
