"""Budgets by their options: the forms of a score, and how the radii of a batch are shared out."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mwpb_kernels as ops
import pytest
import torch

from mwpb_fast.budgets import deviation, margin
from mwpb_fast.config import ConfigError, from_dict, recipe, resolve, to_dict

P = torch.tensor([[0.7, 0.2, 0.1]]).repeat(3, 1)
Y = torch.arange(3)
MARGINS, DEVIATIONS = (0.5, -0.5, -0.6), (0.5522681, 0.3605551, 0.4301163)
RELEASED: dict[str, Any] = {"eps": Fraction(31, 1000), "alpha": 0.52}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("config", "scores"),
    [
        (margin.Config(**RELEASED), MARGINS),
        (margin.Config(**RELEASED, form="reversed"), [-m for m in MARGINS]),
        (margin.Config(**RELEASED, form="signed"), [0.5, 0, 0]),
        (deviation.Config(**RELEASED), DEVIATIONS),
        (deviation.Config(**RELEASED, form="signed"), [DEVIATIONS[0], 0, 0]),
        (deviation.Config(**RELEASED, form="standardised"), [1.3970014, -0.5080005, -0.8890009]),
    ],
)
def test_radii_of_known_probabilities(config: Any, scores: list[float], reference: bool) -> None:
    with ops.force_reference(reference):
        radius = config.build()(P.log(), Y)
    expected = torch.tensor([math.exp(0.52 * score) * 0.031 for score in scores])
    assert radius.dtype == torch.float32
    torch.testing.assert_close(radius, expected, rtol=2e-6, atol=0)


def test_radii_as_released() -> None:
    by_margin = margin.Config(**RELEASED).build()(P.log(), Y)
    by_deviation = deviation.Config(**RELEASED).build()(P.log(), Y)
    torch.testing.assert_close(by_margin, torch.tensor([0.0402048, 0.0239026, 0.0226914]), rtol=0, atol=6e-8)
    torch.testing.assert_close(by_deviation, torch.tensor([0.0413126, 0.0373927, 0.0387700]), rtol=0, atol=6e-8)


@pytest.mark.parametrize("config", [margin.Config(), margin.Config(form="reversed"), deviation.Config(alpha=1.0)])
def test_a_batch_is_shared_out(config: Any) -> None:
    """Rescaled: mean eps and the same proportions. Equal: the same mean and no proportions."""
    logits, y = 3 * torch.randn(64, 10, generator=torch.Generator().manual_seed(2)), torch.arange(64) % 10
    eps = float(config.eps)
    own, rescaled, equal = (
        type(config)(**{**vars(config), "share": share}).build()(logits, y)
        for share in ("own", "rescaled", "equal")
    )
    assert own.mean().item() != pytest.approx(eps, rel=1e-3)
    assert rescaled.mean().item() == pytest.approx(eps, rel=1e-6)
    torch.testing.assert_close(rescaled / rescaled[0], own / own[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(equal, own.mean().expand(64), rtol=0, atol=0)
    assert equal.is_contiguous()


@pytest.mark.parametrize("form", ["plain", "reversed", "signed"])
@pytest.mark.parametrize("share", ["own", "rescaled", "equal"])
def test_without_alpha_or_eps_nothing_is_left_to_share(form: Any, share: Any) -> None:
    logits, y = torch.randn(8, 10), torch.arange(8)
    for eps in (Fraction(8, 255), Fraction(0)):
        radius = margin.Config(eps=eps, alpha=0.0, form=form, share=share).build()(logits, y)
        torch.testing.assert_close(radius, torch.full((8,), float(eps)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [margin.Config(form="signed"), deviation.Config(form="signed")])
def test_a_radius_that_is_none_stays_none(config: Any) -> None:
    logits = torch.randn(3, 10)
    logits[1, 4] = math.nan
    assert config.build()(logits, Y).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("make", [margin.Config, deviation.Config])
@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"form": "other"}, {"share": "other"}])
def test_options_without_sense_are_refused(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)
    (key,) = options
    with pytest.raises(ConfigError, match=key):
        resolve(recipe("table1.mwpb_at"), [], [f"--budget.{key}={options[key]}"])


def test_a_run_from_before_the_released_formula_keeps_its_own() -> None:
    """A saved configuration that does not name the form is of a version that had one alone."""
    saved = to_dict(resolve(recipe("table1.mwpb_at"), [], ["--budget=deviation", "--budget.alpha=0.3"]))
    assert from_dict(saved).budget == deviation.Config(alpha=0.3)
    del saved["budget"]["form"], saved["natural_pass"], saved["optim"]["clip_norm"]
    assert from_dict(saved).budget == deviation.Config(alpha=0.3, form="standardised")
