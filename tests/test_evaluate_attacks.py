"""Every attack where the optimum is known, on linear models; own radii; parts of the images; the worst case."""

from __future__ import annotations

import logging
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    EPS,
    config,
    flags_of,
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
from mwpb_fast.evaluation import sharded
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.contract import AttackSetting


def two_sided(norm: int, n: int = 60) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model of 10 classes, eight of which never win, images amid [0, 1] and labels; and the least change
    of each image, |z_0 - z_1| / |w_0 - w_1| in the dual norm, that turns the prediction."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 10)).eval()
    with torch.no_grad():
        weight = model[1].weight.view(10, 3, 6, 6)
        weight[..., -1, :], weight[..., -1] = 0, 0  # where the package's Square does not go
        model[1].weight[2:] = 0
        model[1].bias[2:] = -100
        model[1].weight[:2] *= 3
        model[1].bias[:2] = -model[1].weight[:2].sum(1) / 2
        x = 0.35 + 0.3 * torch.rand(n, 3, 6, 6)
        logits = model(x)
        least = (logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(
            model[1].weight[0] - model[1].weight[1], ord=norm
        )
    return model, x, logits.argmax(1), least


@pytest.mark.parametrize(
    ("name", "norm", "near"),
    [
        *((name, 1, 0.01) for name in ("fgsm", "pgd20", "pgd20x2", "cw20", "aa")),
        *((name, 1, 0.01) for name in ("apgd-ce", "apgd-t", "fab", "square")),
        ("spsa32", 1, 0.05),  # where the weight is next to 0, an estimate's sign is chance
        *((name, 2, 0.01) for name in ("aa-l2", "pgd20-l2", "pgd20x2-l2", "cw20-l2")),
    ],
)
def test_attack_finds_exactly_what_a_linear_model_must_lose(name: str, norm: int, near: float) -> None:
    model, x, y, least = two_sided(norm)
    eps = Fraction(float(least.median())).limit_denominator(10**6)
    clear = (least / float(eps) - 1).abs() > near
    x, y, least = x[clear], y[clear], least[clear]
    (result,) = run(model, (x, y), replace(config(f"{name}@{eps}"), eps=Fraction(1)))["attacks"].values()
    expected = sharded.bits(least > float(eps))
    assert {"0", "1"} == set(expected)
    assert result["flags"] == expected
    assert (result["eps"], result["norm"]) == (str(eps), {1: "linf", 2: "l2"}[norm])


@pytest.mark.usefixtures("short")
def test_the_whole_is_at_least_as_strong_as_its_parts() -> None:
    model = linear()
    settings = config("aa", "apgd-ce", "apgd-t", "fab", "square")
    attacks = run(model, labelled(model), replace(settings, eps=EPS / 2))["attacks"]
    assert all(attacks["aa"]["accuracy"] <= attacks[name]["accuracy"] for name in settings.attacks)
    # the first part sees the same images as it does alone
    assert attacks["apgd-ce"]["accuracy"] == attacks["aa"]["after"]["apgd-ce"]
    assert list(attacks["square"]["after"]) == ["clean", "square"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("component", aa.STANDARD)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.1)])
def test_a_part_alone_gives_the_images_of_the_bare_package(component: str, norm: str, eps: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    model.requires_grad_(False)
    x = torch.rand(30, 3, 6, 6)
    y = model(x).argmax(1)
    result = aa.autoattack(model, x, y, eps=eps, norm=norm, seed=3, components=[component])
    plain = package.AutoAttack(model, eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm], seed=3, version="standard")
    plain.attacks_to_run = [component]
    logging.disable(logging.CRITICAL)
    try:
        x_adv, labels = plain.run_standard_evaluation(x, y, batch_size=250)
    finally:
        logging.disable(logging.NOTSET)
    assert torch.equal(result.x_adv, x_adv)
    assert torch.equal(result.correct, labels == y)
    assert result.correct.sum() < 30


def test_parameters_are_pinned_whatever_the_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Other(package.AutoAttack):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.square.n_queries, self.square.rescale_schedule, self.fab.n_iter = 7, True, 7

        def run_standard_evaluation(self, x: Tensor, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            made.append(self)
            return x, y

    monkeypatch.setattr(package, "AutoAttack", Other)
    model = linear()
    result = run(model, labelled(model), config("square", "fab"))["attacks"]
    square, fab = made[0].square, made[1].fab
    assert (square.n_queries, square.p_init, square.rescale_schedule) == (5000, 0.8, False)
    assert (fab.n_iter, fab.n_target_classes) == (100, 9)
    assert result["square"]["parameters"] == {
        "square": {"n_queries": 5000, "p_init": 0.8, "rescale_schedule": False, "n_restarts": 1}
    }


def test_parts_for_few_classes() -> None:
    assert (
        find_attack("square").needs(2) == find_attack("apgd-ce").needs(2) == {"pyautoattack": package.__version__}
    )
    assert aa.deviations(3, ["fab-t"]) == ("2 target classes instead of 9",)
    assert aa.deviations(10, ["fab-t"]) == aa.deviations(3, ["square"]) == ()
    assert aa.deviations(2) == ("without apgd-t, whose loss needs 4 classes", "1 target class instead of 9")
    with pytest.raises(ConfigError, match="apgd-t needs at least 4 classes"):
        find_attack("apgd-t").needs(3)


def test_images_too_small_for_square_in_l2_are_refused() -> None:
    model = linear()
    with pytest.raises(ConfigError, match="at least 5 by 5 pixels"):
        run(model, labelled(model), config("aa-l2"))


# radii of their own ---------------------------------------------------------------------------------------------


def test_suffix_sets_radius_and_step() -> None:
    attack = find_attack("pgd20@6/255")
    common = AttackSetting(EPS, EPS / 8, None)  # type: ignore[arg-type]
    assert (attack.setting(common).eps, attack.setting(common).step_size) == (Fraction(6, 255), EPS / 8)
    attack = find_attack("cw5x3@0.25:1/16")
    assert (attack.setting(common).eps, attack.setting(common).step_size) == (Fraction(1, 4), Fraction(1, 16))
    attack = find_attack("aa-l2")
    assert (attack.setting(common).eps, attack.setting(common).norm) == (Fraction(128, 255), "l2")
    attack = find_attack("aa-l2@0.5")
    assert (attack.setting(common).eps, attack.setting(common).norm) == (Fraction(1, 2), "l2")
    assert find_attack("pgd20").setting(common) == common


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pgd20@", "'' is not a radius"),
        ("pgd20@8/0", "'8/0' is not a radius"),
        ("pgd20@-1", "not a radius"),
        ("pgd20@1:", "'' is not a radius"),
        ("natural@1/2", "natural has no radius"),
        ("aa@1/2:1/4", "aa has no step size"),
        ("fgsm@1/2:1/4", "fgsm has no step size"),
        ("nope@1/2", "no attack 'nope'"),
    ],
)
def test_wrong_suffixes_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        find_attack(name)
    assert "\n" not in str(error.value)


def test_sweep_stands_in_result_ball_and_shards(tmp_path: Path) -> None:
    model = linear()
    images = labelled(model)
    names = ("pgd20", *(f"pgd20@{eps}/255" for eps in (0, 2, 6, 8, 10, 12)))
    result = run(model, images, config("natural", *names), folder=tmp_path / "e")
    attacks = result["attacks"]
    assert [attacks[name]["eps"] for name in names] == [
        "8/255", "0", "2/255", "2/85", "8/255", "2/51", "4/85",
    ]  # fmt: skip
    assert "eps" not in attacks["natural"]
    assert attacks["pgd20@6/255"]["eps_float"] == 6 / 255
    assert attacks["pgd20@0/255"]["flags"] == attacks["natural"]["flags"]
    accuracies = [attacks[name]["accuracy"] for name in names[1:]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[1] > accuracies[-1]
    # the same radius by either name is the same work: 8/255 shares its shard
    assert len(list((tmp_path / "e").iterdir())) == len(names)
    assert attacks["pgd20@8/255"]["flags"] == attacks["pgd20"]["flags"]
    for name in names[1:]:  # each as if it were the evaluation's own
        own = replace(config("pgd20"), eps=Fraction(name.partition("@")[2]))
        assert flags_of(run(model, images, own))["pgd20"] == attacks[name]["flags"]
    # what is compared with other radii is not the worst of one
    assert result["worst"]["of"] == ["natural", "pgd20", "pgd20@8/255"]
    assert result["worst"]["accuracy"] == attacks["pgd20"]["accuracy"]


def test_ball_of_the_suffix_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    far = {"linf_step_": lambda x_adv, g, x, radius, step: x_adv.copy_((x + 7 / 255).clamp(0, 1))}
    for name, function in far.items():
        monkeypatch.setattr(f"mwpb_kernels.{name}", function)
    run(model, labelled(model), config("pgd1"))
    with pytest.raises(ConfigError, match="with eps 2/85"):
        run(model, labelled(model), config("pgd1@6/255"))


def test_restarts_are_the_worst_of_starts() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    images = labelled(model, 200)
    few = replace(config("pgd1", "pgd1x2", "pgd1x8"), step_size=Fraction(1, 2550), eps=EPS / 4)
    result = run(model, images, few)["attacks"]
    one, two, eight = (result[name]["flags"] for name in ("pgd1", "pgd1x2", "pgd1x8"))
    assert all(a >= b >= c for a, b, c in zip(one, two, eight, strict=True))
    assert result["pgd1"]["correct"] > result["pgd1x8"]["correct"]
    # a start of its own, not the first one again
    survivors = result["pgd1"]["correct"]
    assert result["pgd1x2"]["forwards"] == 2 * 200 + 2 * survivors


def test_fgsm_is_one_step_of_the_radius() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x, y = labelled(model, 200)
    leaf = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    x_adv = (x + float(EPS) / 2 * leaf.grad.sign()).clamp(0, 1)
    expected = sharded.bits(model(x_adv).argmax(1) == y)
    assert run(model, (x, y), config(f"fgsm@{EPS / 2}"))["attacks"][f"fgsm@{EPS / 2}"]["flags"] == expected
