"""Attacks beside the uniform linf ball: radii of equal mean given out by the margin, and l2 steps."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import mwpb_kernels as ops
import pytest
import torch
from evaluate_cases import (
    EPS,
    config,
    labelled,
    linear,
    one_thread,  # noqa: F401  # an autouse fixture
    run,
)

from mwpb_fast.config import ConfigError, EvaluationConfig
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.score import format_table
from mwpb_fast.evaluation.trust import plan


def test_radii_of_equal_mean_follow_the_margin_or_its_reverse() -> None:
    model = linear()
    x, y = labelled(model)
    asked = replace(config("natural", "pgd20", "pgd20-weighted", "pgd20-reversed"), batch_size=len(y))
    result = run(model, (x, y), asked)
    attacks, eps = result["attacks"], float(EPS)
    margin = ops.margin(model(x).detach(), y)
    for name, sign in (("pgd20-weighted", 1), ("pgd20-reversed", -1)):
        radius = torch.tensor(attacks[name]["values"]["radius"])
        assert radius.mean().item() == pytest.approx(eps, rel=1e-5)
        factor = torch.exp(0.58 * sign * margin)
        torch.testing.assert_close(radius, eps * factor / factor.mean(), rtol=1e-5, atol=0)
        assert attacks[name]["parameters"] == {
            "alpha": 0.58, "form": "plain" if sign > 0 else "reversed", "share": "rescaled",
        }  # fmt: skip
        word = "weighted" if sign > 0 else "reversed"
        assert attacks[name]["eps"] == f"mean {EPS}, {word} (another threat model)"
        assert "another threat model" in format_table(result)
    assert result["worst"]["of"] == ["natural", "pgd20"]


@pytest.mark.parametrize("name", ["pgd20-weighted", "pgd20-reversed"])
def test_a_linear_model_loses_exactly_what_its_radii_reach(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    x = 0.4 + 0.2 * torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model[1].bias.copy_(-(model[1].weight @ x.flatten(1).mean(0)))
        logits = model(x)
    least = (logits[:, 0] - logits[:, 1]).abs() / (model[1].weight[0] - model[1].weight[1]).abs().sum().detach()
    eps = Fraction(float(least.median())).limit_denominator(10**6)
    settings = EvaluationConfig(attacks=(name,), eps=eps, step_size=eps / 8)
    (found,) = run(model, (x, logits.argmax(1)), settings)["attacks"].values()
    radius = torch.tensor(found["values"]["radius"])
    clear = (least / radius - 1).abs() > 0.01
    flags = torch.tensor([flag == "1" for flag in found["flags"]])
    assert torch.equal(flags[clear], (least > radius)[clear])
    assert 0 < flags.sum() < 50


def test_an_own_radius_takes_the_own_step_along() -> None:
    for name, eps, step in (
        ("pgd20-l2", Fraction(128, 255), Fraction(16, 255)),
        ("pgd20-l2@128/255", Fraction(128, 255), Fraction(16, 255)),
        ("pgd20-l2@64/255", Fraction(64, 255), Fraction(8, 255)),
        ("cw50x2-l2@2:1/2", Fraction(2), Fraction(1, 2)),
        ("pgd20@6/255", Fraction(6, 255), None),
    ):
        attack = find_attack(name)
        assert (attack.eps, attack.step_size) == (eps, step)
        assert attack.norm == ("l2" if "l2" in name else None)


MEANT = {
    "pgd20x2-weighted": "pgd20-weighted",
    "cw20-reversed": "pgd20-reversed",
    "pgd20-nope": "pgd20",
    "pgd-l2": "pgd20-l2",
    "spsa20-l2": "spsa20",
    "pgd-50": "pgd50",
    "AA": "aa",
}


@pytest.mark.parametrize("name", MEANT)
def test_names_that_there_are_not(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no attack '{name}'; did you mean {MEANT[name]}\?$"):
        find_attack(name)
    with pytest.raises(
        ConfigError, match=r"no attack 'autoattack'; there are .*pgd20-l2, cw20-l2, pgd20-weighted"
    ):
        find_attack("autoattack")


def test_a_trust_report_has_them_beside_the_uniform_radius() -> None:
    assert {"pgd20", "pgd20-weighted", "pgd20-reversed"} <= set(plan(EvaluationConfig()))
