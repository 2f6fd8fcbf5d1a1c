"""docs/methods.md: its program runs as it stands, its options are options, its defaults are the defaults."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mwpb_fast.config import axis_config
from mwpb_fast.options import configure, split

DOC = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
AWP = importlib.util.find_spec("mwpb_fast.perturbations.awp") is not None


def run(blocks: list[str], shared: dict[str, Any]) -> dict[str, Any]:
    for block in blocks:
        exec(compile(block, "methods.md", "exec", dont_inherit=True), shared)
    return shared


def test_the_parts_run_in_a_loop_of_your_own() -> None:
    assert len(BLOCKS) == 5
    shared = run(BLOCKS[:3], {"__name__": "methods"})
    radius, distance = shared["radius"], (shared["x_adv"] - shared["x"]).abs().flatten(1).amax(1)
    assert (distance <= radius + 1e-6).all()
    assert distance.max() > 8 / 255  # a ball of its own
    assert 0 < shared["notes"]["hits"].max() <= 1
    run(BLOCKS[3:4], shared)
    assert shared["serving"] == shared["objective"]  # the burn-in is over
    assert shared["loss"].isfinite()


@pytest.mark.skipif(not AWP, reason="no perturbation awp")
def test_awp_runs_in_a_loop_of_your_own() -> None:
    shared = run(BLOCKS[:4], {"__name__": "methods"})
    plain = copy.deepcopy({k: shared[k] for k in ("model", "optimizer")})
    run(BLOCKS[4:], shared)
    assert shared["loss"].isfinite()
    plain["optimizer"].zero_grad()
    shared["objective"].outer(plain["model"], *(shared[k] for k in ("x", "x_adv", "y", "notes"))).backward()
    plain["optimizer"].step()
    for p, q in zip(shared["model"].parameters(), plain["model"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)  # a step from the same weights,
        assert not torch.equal(p, q)  # but down the perturbed loss


@pytest.mark.parametrize("name", ["wat", "mail", "gairat"])
def test_defaults_are_those_of_the_page(name: str) -> None:
    row = next(line for line in DOC.splitlines() if f"`--objective {name}" in line).split(" | ")
    stated = dict(re.findall(r"`(\w+)` ([^,|]+)", row[-1].rstrip(" |")))
    config = axis_config("objectives", name)
    for field, value in stated.items():
        own = getattr(config, field)
        assert own is None if value == "the base's" else str(own) == value or float(own) == float(value), field
    assert len(stated) >= 3


PHRASES = set(re.findall(r"`(--[^`]+)`", DOC.replace("\n", " ")))
OPTIONS = sorted(p for p in PHRASES if re.search("wat|mail|gairat", p))


@pytest.mark.parametrize("words", OPTIONS)
def test_options_are_options(words: str) -> None:
    own, overrides = split(words.split(), ())
    assert not own
    configure("table1.mwpb_at", {}, overrides)
