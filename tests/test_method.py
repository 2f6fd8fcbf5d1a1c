"""A method as one point: defaults, phases, memory, when two are the same; and modules that lack a part."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import Crafted, method

from mwpb_fast.attacks import adaptive, pgd
from mwpb_fast.budgets import fixed, margin
from mwpb_fast.config import AXES, ConfigError, axis_config, names, recipe, resolve
from mwpb_fast.engine.build import make_method
from mwpb_fast.method import CONFIGS, Attack, Budget, Method, Objective, ObjectiveConfig, Perturbation
from mwpb_fast.objectives import at, gairat, trades

KINDS = {"budgets": Budget, "attacks": Attack, "objectives": Objective, "perturbations": Perturbation}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_module_inherits_from_its_axis(kind: str) -> None:
    for name in names(kind):
        config = axis_config(kind, name)
        assert CONFIGS[kind] in type(config).__mro__, name
        assert KINDS[kind] in type(config.build()).__mro__, name
    assert set(CONFIGS) == set(AXES.values())


def test_what_an_axis_does_not_say_has_a_default() -> None:
    attack = pgd.Config().build()
    assert (attack.memory, attack.uncapturable) == ({}, "")
    assert attack.in_epoch(7) is attack
    attack.remember(10, torch.device("cpu"))
    assert attack.memory == {}
    with pytest.raises(TypeError):
        attack.memory["radius"] = torch.zeros(10)  # type: ignore[index]  # it is everybody's
    assert (at.AT().uses_clean, margin.Config().build().uses_logits) == (False, True)
    assert (at.Config().needs, pgd.Config().gives, pgd.Config().own_loss) == (frozenset(), frozenset(), False)


def test_the_method_of_a_configuration_and_its_phases() -> None:
    options = ["--attack=adaptive", "--budget=fixed", "--warmup_epochs=2", "--attack.warmup_epochs=1"]
    whole = Method.build(resolve(recipe("digits.mwpb_at"), [], options))
    first, second, third = (whole.in_epoch(epoch) for epoch in (1, 2, 3))
    assert [m.budget for m in (first, second, third)] == [whole.warmup, whole.warmup, whole.budget]
    assert first != second  # the attack's own warm-up
    assert second != third
    assert third == whole.in_epoch(9)
    whole.remember(5, torch.device("cpu"))
    assert {name: list(memory) for name, memory in whole.memory.items()} == {"attack": ["radius"]}
    assert first.memory["attack"]["radius"] is whole.memory["attack"]["radius"]  # one memory in all phases


def test_the_natural_logits_are_asked_for_where_somebody_looks_at_them() -> None:
    still = fixed.Config().build()
    assert [m.uses_clean for m in (method("at", budget=still), method("trades", budget=still), method("at"))] == [
        False,
        True,
        True,
    ]


def test_methods_are_equal_where_they_are_known_to_compute_the_same() -> None:
    assert method("trades") == method(trades.TRADES(6.0))
    assert method("trades") != method(trades.TRADES(5.0))
    assert method() != "at"
    weighted = gairat.Config().build()
    assert method(weighted) == method(gairat.Config().build())

    @dataclass(frozen=True)
    class Holds(at.AT):
        values: torch.Tensor

    values = torch.zeros(3)
    assert method(Holds(values)) == method(Holds(values))
    assert method(Holds(values)) != method(Holds(values.clone()))  # of which nothing is known
    attack = adaptive.Config().build()
    assert method(attack=attack) == method(attack=attack)
    assert method(attack=attack) != method(attack=adaptive.Config().build())  # it remembers
    assert method(attack=Crafted(torch.add)) != method(attack=Crafted(torch.sub))


MODULE = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Config:
    def build(self):
        return object()
"""


def outside(folder: Path, patch: pytest.MonkeyPatch, text: str) -> str:
    """The dotted path of a module of the user's."""
    (folder / "lacking").mkdir()
    (folder / "lacking" / "mine.py").write_text(text)
    patch.syspath_prepend(folder)
    for name in ("lacking", "lacking.mine"):
        patch.delitem(sys.modules, name, raising=False)
    return "lacking.mine"


@pytest.mark.parametrize("kind", CONFIGS)
def test_options_that_inherit_from_nothing_are_refused_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = outside(tmp_path, monkeypatch, MODULE)
    lacking = {"budgets": "eps", "attacks": "gives", "objectives": "needs"}.get(kind)
    if lacking is None:  # a perturbation's have nothing but `build`
        assert axis_config(kind, path)
        return
    cure = rf"inherit from mwpb_fast\.method\.{CONFIGS[kind].__name__}"
    with pytest.raises(ConfigError, match=rf"lacking\.mine\.Config has no .*{lacking}.*: {cure}"):
        axis_config(kind, path)


def test_options_without_build_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from mwpb_fast.method import ObjectiveConfig\nclass Config(ObjectiveConfig): pass\n"
    with pytest.raises(ConfigError, match=r"lacking\.mine: .*abstract.*build"):
        axis_config("objectives", outside(tmp_path, monkeypatch, text))


def test_options_that_are_all_inherited_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from mwpb_fast.objectives import trades\nclass Config(trades.Config): pass\n"
    path = outside(tmp_path, monkeypatch, text)
    found = resolve(recipe("digits.at"), [], [f"--objective={path}", "--objective.beta=2.5"])
    assert type(found.objective) is type(axis_config("objectives", path))
    assert found.objective.beta == 2.5


def test_an_axis_that_lacks_a_part_is_refused_by_name() -> None:
    class Bare:
        inner = staticmethod(at.AT.inner)

    class Half(Objective):
        inner = staticmethod(at.AT.inner)

    @dataclass(frozen=True, kw_only=True)
    class Config(ObjectiveConfig):
        whole: bool = False

        def build(self) -> Any:
            return Half() if self.whole else Bare()  # type: ignore[abstract]

    config = resolve(recipe("digits.mwpb_at"), [], [])
    for whole, expected in (
        (False, "Bare has no .*outer.*: inherit from"),
        (True, "Half.* abstract method.* '?outer"),
    ):
        made = {**vars(config), "objective": Config(whole=whole)}
        with pytest.raises(ConfigError, match=expected):
            make_method(type(config)(**made))
