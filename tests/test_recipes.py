"""Every recipe is whole, and has the paper's numbers."""

from __future__ import annotations

import dataclasses
import importlib
import math
from fractions import Fraction

import pytest
import torch
import yaml

from mwpb_fast.config import all_recipes, from_dict, recipe, to_dict
from mwpb_fast.models import build_model
from mwpb_fast.optim import learning_rate

TABLES = {
    "table1": ("cifar10", "resnet-18", 0.1, 5e-4),
    "table2": ("cifar10", "wrn-34-10", 0.1, 5e-4),
    "table3": ("svhn", "resnet-18", 0.01, 3.5e-3),
    "table4": ("tinyimagenet", "resnet-18", 0.01, 3.5e-3),
}
# methods.md, section 1: alpha and the interval that radii can reach, of AT, TRADES and MART
CIFAR = {"at": (0.58, 0.01757, 0.05603), "trades": (0.42, 0.02061, 0.04775), "mart": (0.55, 0.01810, 0.05438)}
SVHN = {"at": (0.50, 0.01903, 0.05172), "trades": (0.15, 0.02700, 0.03645), "mart": (0.60, 0.01722, 0.05716)}
TINY = {"at": (0.55, 0.01810, 0.05438), "trades": (0.40, 0.02103, 0.04680), "mart": (0.70, 0.01558, 0.06318)}
ALPHAS = {"table1": CIFAR, "table2": CIFAR, "table3": SVHN, "table4": TINY}
METHODS = ("at", "trades", "mart")
ROWS = [f"{prefix}{method}" for method in METHODS for prefix in ("", "control_", "mwpb_")]
EIGHT = Fraction(8, 255)
OTHERS = {
    "table5": [
        "mma",
        "wat",
        "mail",
        "gairat",
        "awp",
        "st",
        "iaat",
        *(f"{p}_{m}" for p in ("control", "mwpb") for m in ("at", "awp")),
    ],
    "table6": ["control_at", "mwpb_at", "mwpb_trades", "mwpb_mart", "mma"],
    "table7": ROWS,
    "table8": [f"alpha_{n:03d}" for n in (0, 10, 20, 30, 40, 50, 58, 70, 85, 120)],
}


def test_every_table_has_every_row() -> None:
    expected = {f"{table}.{row}" for table in (*TABLES, "small", "digits") for row in ROWS}
    expected |= {f"{table}.{row}" for table, rows in OTHERS.items() for row in rows}
    modules = {name.partition(".")[0] for name in expected}
    assert {name for name in all_recipes() if name.partition(".")[0] in modules} == expected


@pytest.mark.parametrize("name", all_recipes())
def test_is_whole(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    for part in (config.warmup, config.budget, config.attack, config.objective, config.perturbation):
        part.build()
    module, function = name.split(".")
    doc = getattr(importlib.import_module(f"mwpb_fast.recipes.{module}"), function).__doc__
    assert doc.count("\n") == 0
    assert doc.endswith(".")


def test_rows_say_their_own_numbers() -> None:
    def said(name: str) -> str:
        table, _, row = name.partition(".")
        return vars(importlib.import_module(f"mwpb_fast.recipes.{table}"))[row].__doc__

    assert said("table1.at") == "Plain AT: radius 8/255 in every epoch, uniform start."
    assert said("table2.mart") == "Plain MART, beta = 6: radius 8/255 in every epoch."
    assert said("digits.control_trades") == "TRADES in two phases, 16/255 then 32/255: MWPB-TRADES with alpha = 0."
    assert said("table3.mwpb_trades") == "MWPB-TRADES, beta = 6, alpha = 0.15."
    assert said("table8.alpha_120") == "MWPB-AT, alpha = 1.2."


@pytest.mark.parametrize("name", ["table1.at", "table2.at", "table4.at", "small.at", "digits.at"])
def test_model_can_be_built(name: str) -> None:
    with torch.device("meta"):
        model = build_model(recipe(name).model.name, num_classes=10)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("row", ROWS)
def test_schedule_is_the_papers(table: str, row: str) -> None:
    config = recipe(f"{table}.{row}")
    name, model, lr, weight_decay = TABLES[table]
    assert (config.data.name, config.model.name) == (name, model)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.momentum) == (lr, weight_decay, 0.9)
    assert (config.epochs, config.data.batch_size, config.attack_mode) == (110, 128, "eval")
    rates = {epoch: learning_rate(config.optim, epoch) for epoch in (1, 79, 80, 89, 90, 110)}
    expected = {1: lr, 79: lr, 80: lr / 10, 89: lr / 10, 90: lr / 100, 110: lr / 100}
    assert rates == pytest.approx(expected, rel=1e-12)
    assert (config.attack.norm, config.attack.steps, config.attack.step_ratio) == ("linf", 10, Fraction(1, 4))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("method", METHODS)
def test_mwpb_radii_reach_the_interval_of_the_paper(table: str, method: str) -> None:
    config = recipe(f"{table}.mwpb_{method}")
    alpha, low, high = ALPHAS[table][method]
    assert config.budget.alpha == alpha
    assert (config.budget.eps, config.warmup.eps, config.warmup_epochs) == (EIGHT, EIGHT / 2, 80)
    assert (config.attack.start, config.attack.sigma) == ("gaussian", 0.001)
    assert float(EIGHT) * math.exp(-alpha) == pytest.approx(low, abs=5.1e-6)
    assert float(EIGHT) * math.exp(alpha) == pytest.approx(high, abs=5.1e-6)
    # margins of -1 and 1: all the probability on a wrong class, and on the right one
    logits, labels = torch.tensor([[200.0, 0.0, 0.0], [200.0, 0.0, 0.0]]), torch.tensor([1, 0])
    radius = config.budget.build()(logits, labels)
    assert radius.tolist() == pytest.approx([low, high], abs=6e-6)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_method_differ_in_what_they_must_only(table: str, method: str) -> None:
    plain, control, mwpb = (to_dict(recipe(f"{table}.{prefix}{method}")) for prefix in ("", "control_", "mwpb_"))
    assert {key for key in mwpb if mwpb[key] != control[key]} == {"recipe", "budget"}
    assert control["budget"] == {**mwpb["budget"], "alpha": 0.0}
    free = {"recipe", "budget", "warmup_epochs"} | ({"attack"} if method == "at" else set())
    assert {key for key in mwpb if mwpb[key] != plain[key]} == free
    assert plain["budget"] == {"name": "fixed", "eps": "8/255"}
    assert plain["warmup_epochs"] == 0


def test_edges_of_the_two_phases() -> None:
    config = recipe("table1.control_at")
    budgets = {
        epoch: config.warmup if epoch <= config.warmup_epochs else config.budget for epoch in (1, 80, 81, 110)
    }
    logits, labels = torch.randn(5, 10), torch.arange(5)
    radii = {epoch: budget.build()(logits, labels) for epoch, budget in budgets.items()}
    for epoch, eps in {1: 4 / 255, 80: 4 / 255, 81: 8 / 255, 110: 8 / 255}.items():
        torch.testing.assert_close(radii[epoch], torch.full((5,), eps), rtol=1e-6, atol=0)
        step = config.attack.build().step_size(radii[epoch])
        torch.testing.assert_close(step, torch.full((5,), eps / 4), rtol=1e-6, atol=0)


def test_betas() -> None:
    for table in TABLES:
        assert recipe(f"{table}.mwpb_trades").objective.beta == 6
        assert recipe(f"{table}.mwpb_mart").objective.beta == (6 if table == "table2" else 5)


def test_evaluation_and_augmentation() -> None:
    for table in TABLES:
        config = recipe(f"{table}.mwpb_at")
        steps = "pgd20" if config.data.name == "cifar10" else "pgd100"
        assert config.evaluation.attacks == ("natural", steps, "cw20", "aa")
        assert (config.evaluation.eps, config.evaluation.step_size) == (EIGHT, Fraction(1, 255))
        assert config.evaluation.subset == 0
        augmented = config.data.name != "svhn"
        assert (config.data.pad, config.data.flip) == ((4, True) if augmented else (0, False))


def test_small_and_digits_keep_the_papers_shape() -> None:
    for table in ("small", "digits"):
        config = recipe(f"{table}.mwpb_trades")
        assert config.warmup.eps * 2 == config.budget.eps == config.evaluation.eps
        assert 0 < config.warmup_epochs < config.epochs
        assert config.optim.drops[0] <= config.warmup_epochs < config.optim.drops[1] <= config.epochs
        assert config.budget.alpha == 0.42


@pytest.mark.parametrize("name", [n for n in all_recipes() if n.partition(".")[0] in OTHERS])
def test_every_wide_resnet_row_has_the_settings_of_table_2(name: str) -> None:
    """What the paper says of the other methods too: its model, learning rate, batch and weight decay."""
    config, table2 = recipe(name), recipe("table2.at")
    for field in ("data", "model", "optim", "epochs", "warmup", "precision"):
        assert getattr(config, field) == getattr(table2, field), field
    assert config.warmup_epochs == (80 if hasattr(config.budget, "alpha") else 0)


@pytest.mark.parametrize("row", OTHERS["table8"])
def test_alphas_of_table_8(row: str) -> None:
    config = recipe(f"table8.{row}")
    assert config.budget.alpha == int(row.removeprefix("alpha_")) / 100
    assert dataclasses.replace(config, budget=None, recipe="", evaluation=None) == dataclasses.replace(
        recipe("table2.mwpb_at"), budget=None, recipe="", evaluation=None
    )


def test_published_hyper_parameters_of_the_other_methods() -> None:
    """methods.md, section 3."""
    mma, wat, mail, gairat, awp, st, iaat = (recipe(f"table5.{name}") for name in OTHERS["table5"][:7])
    assert mma.objective.clean_weight == 1 / 3
    assert mma.budget.eps == Fraction(32, 255)
    assert (wat.objective.base, wat.objective.alpha, wat.attack.start, wat.attack_mode) == (
        "at", 0.5, "uniform", "train",
    )  # fmt: skip
    assert (mail.objective.base, mail.objective.bias, mail.objective.slope) == ("at", -0.5, 10.0)
    # unweighted until the learning rate drops for the first time, as in the authors' schedule
    assert abs(mail.objective.burn_in_epochs - mail.optim.drops[0]) <= 1
    assert (gairat.objective.Lambda, gairat.objective.burn_in_epochs, gairat.attack.start) == (-1, 54, "uniform")
    assert (awp.perturbation.gamma, awp.perturbation.warmup_epochs, awp.attack_mode) == (0.01, 0, "train")
    assert recipe("table5.mwpb_awp").perturbation == awp.perturbation
    assert recipe("table5.mwpb_awp").budget.alpha == 0.58
    assert (st.objective.beta, st.attack_mode) == (6, "batch")
    assert (iaat.attack.growth, iaat.attack.smoothing, iaat.attack_mode) == (Fraction(19, 2550), 0.1, "train")
    for config in (mma, wat, mail, gairat, awp, st, iaat):
        assert config.attack.steps == 10
