"""docs/methods.md: its program runs as it stands, its options are options, its defaults are the defaults."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mwpb_fast.cli.parser import split
from mwpb_fast.config import axis_config
from mwpb_fast.options import configure

DOC = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


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


@pytest.mark.parametrize(
    "axes",
    [
        {"perturbations": "awp"},
        {"objectives": "mma", "attacks": "anpgd"},
        {"objectives": "st", "attacks": "squeeze"},
        {"attacks": "adaptive"},
    ],
    ids=lambda axes: "-".join(axes.values()),
)
def test_defaults_of_several_axes_are_those_of_the_page(axes: dict[str, str]) -> None:
    words = [f"--{kind.removesuffix('s')} {name}" for kind, name in axes.items()]
    row = next(line for line in DOC.splitlines() if line.startswith("|") and all(w in line for w in words))
    stated = re.findall(r"`(\w+)` ([\d./]+)", row.split(" | ")[-1])
    configs = [axis_config(kind, name) for kind, name in axes.items()]
    options = [field.name for config in configs for field in dataclasses.fields(config)]
    assert len(stated) == len(options) - ("step_size" in options)
    for field, value in stated:
        numerator, _, denominator = value.partition("/")
        (own,) = {getattr(c, field) for c in configs if hasattr(c, field)}
        assert float(own) == pytest.approx(float(numerator) / float(denominator or 1), rel=1e-12), field


PHRASES = set(re.findall(r"`(--[^`]+)`", DOC.replace("\n", " ")))
OPTIONS = sorted(p for p in PHRASES if re.search("wat|mail|gairat|awp|mma|squeeze|adaptive", p))


@pytest.mark.parametrize("words", OPTIONS)
def test_options_are_options(words: str) -> None:
    own, overrides = split(words.split(), ())
    assert not own
    configure("table1.mwpb_at", {}, overrides)
