"""Captured steps against eager ones: what verify finds, and what it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_cases import (
    AT,
    OBJECTIVES,
    assert_same,
    batch,
    capture,
    make_step,
    values,
)
from method_cases import method

from mwpb_fast.budgets import fixed
from mwpb_fast.config import load
from mwpb_fast.perturbations import awp


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_verify_finds_nothing_and_leaves_the_state(objective: str) -> None:
    step, asked = make_step(ema=0.9), method(objective)
    captured = capture(step)
    before = values(step)
    assert captured.verify(*batch(0), asked) == []
    assert_same(values(step), before)
    captured(*batch(0), asked)
    assert captured.verify(*batch(1), asked) == []
    assert captured.captures == 1


def test_verify_names_what_differs() -> None:
    """A step with a number of the host in it: a replay keeps the number, and verify shows where it went."""
    step = make_step()
    numbers = iter(range(1, 100))

    class Leaking(type(AT.objective)):  # type: ignore[misc]
        def outer(self, *arguments: Any) -> torch.Tensor:
            return super().outer(*arguments) * next(numbers)

    captured, leaking = capture(step), method(Leaking())
    captured(*batch(0), leaking)
    found = captured.verify(*batch(1), leaking)
    assert "result.loss" in found
    assert any(name.startswith("model.") for name in found)
    assert any(name.startswith("optimizer.") for name in found)
    assert "result.radius" not in found


def test_a_method_is_the_same_throughout_a_phase() -> None:
    """Or a step would be recorded anew in each epoch."""
    phased: list[dict[str, Any]] = [
        {"attack": load("attacks", "adaptive").Config(warmup_epochs=2).build()},
        {"objective": load("objectives", "gairat").Config(burn_in_epochs=2).build()},
        {"perturb": awp.Config(warmup_epochs=2).build()},
        {"warmup": fixed.Config().build(), "warmup_epochs": 2},
    ]
    for axes in phased:
        one, two, three, four = (method(**axes).in_epoch(epoch) for epoch in (1, 2, 3, 4))
        assert one == two
        assert three == four
        assert two != three
