"""What a configuration looks like, and which axes fit together."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import fixed
from mwpb_fast.config import (
    AXES,
    ConfigError,
    axis_name,
    check_axes,
    names,
    recipe,
    resolve,
)
from mwpb_fast.objectives import at
from mwpb_fast.options import configure, listing, values_of

START = recipe("table1.mwpb_at")


def test_listing_shows_every_option_with_its_value() -> None:
    lines = listing(START).splitlines()
    shown = {line.split()[0].removeprefix("--"): line.split()[1] for line in lines if line.startswith("  --")}
    assert set(shown) == {key for key, _ in values_of(START)}
    assert shown["budget.eps"] == "8/255"
    assert shown["warmup.eps"] == "4/255"
    assert shown["optim.drops"] == "[80,90]"
    assert shown["data.flip"] == "true"
    assert shown["data.subset"] == "null"
    assert shown["data.threads"] == "0"
    rebuilt = [f"--{key}={value}" for key, value in shown.items()]
    assert configure("table1.mwpb_at", {}, rebuilt) == START
    assert configure("digits.mwpb_at", {}, rebuilt) == dataclasses.replace(START, recipe="digits.mwpb_at")


def test_axes_name_modules() -> None:
    for field, kind in AXES.items():
        assert axis_name(kind, getattr(START, field)) in names(kind)


class _Asks(at.Config):
    """Axes in which one name, "hits", is asked for or given."""

    needs = frozenset({"hits"})


def test_axes_that_do_not_fit_are_refused_with_the_reason() -> None:
    counting = dataclasses.replace(START.attack, count_correct=True)
    asking = dataclasses.replace(START, objective=_Asks())
    with pytest.raises(ConfigError, match="needs hits of the attack"):
        check_axes(asking)
    check_axes(dataclasses.replace(asking, attack=counting))

    class Own(pgd.Config):
        gives = frozenset({"hits"})
        own_loss = True

    check_axes(dataclasses.replace(asking, attack=Own()))
    with pytest.raises(ConfigError, match="a loss of its own"):
        check_axes(dataclasses.replace(START, attack=Own()))

    class Finds(pgd.Config):
        own_radius = True

    with pytest.raises(ConfigError, match="take budget fixed"):
        check_axes(dataclasses.replace(START, attack=Finds()))
    check_axes(dataclasses.replace(START, attack=Finds(), budget=fixed.Config()))


def test_axes_are_checked_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all options are read: the options that make them fit may come in any order."""
    monkeypatch.setattr(type(START.objective), "needs", frozenset({"hits"}), raising=False)
    with pytest.raises(ConfigError, match="needs hits"):
        configure("table1.mwpb_at", {}, [])
    assert configure("table1.mwpb_at", {}, ["--attack.count_correct=true"]).attack.count_correct


def test_radii_of_l2_balls_may_be_above_1() -> None:
    words = ["--attack.norm=l2", "--budget.eps=2", "--warmup.eps=3/2"]
    assert configure("table1.mwpb_at", {}, words).budget.eps == 2
    assert configure("table1.mwpb_at", {}, ["--budget.eps=1"]).budget.eps == 1


def test_resolve_without_overrides_changes_nothing() -> None:
    assert resolve(START, [], []) == START


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys\n"
        "from mwpb_fast.options import configure\n"
        "configure('table4.mwpb_mart', {}, ['--budget.eps=6/255', '--objective=trades'])\n"
        "heavy = {'torch', 'triton', 'scipy', 'sklearn', 'matplotlib', 'nvidia.dali'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
