"""Weighted objectives: what does not fit is refused, and options reach the base."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from mwpb_fast.config import ConfigError, from_dict, to_dict
from mwpb_fast.objectives import at, mail, trades, wat
from mwpb_fast.options import configure

COUNT = "--attack.count_correct=true"


REFUSALS = [
    (["--objective=gairat"], "gairat needs hits of the attack"),
    (["--objective=gairat", COUNT, "--attack.steps=0"], "count_correct counts over the steps"),
    (["--objective=gairat", COUNT, "--objective.schedule=cosine"], "cosine is not one of fixed"),
    (["--objective=gairat", COUNT, "--objective.schedule=linear", "--objective.Lambda=9"], "5.0 is below 9.0"),
    (["--objective=gairat", COUNT, "--objective.schedule_epochs=0"], "schedule_epochs must be at least 1"),
    (["--objective=gairat", COUNT, "--objective.burn_in_epochs=-1"], "burn_in_epochs must not be negative"),
    (["--objective=mail", "--objective.burn_in_epochs=-1"], "burn_in_epochs must not be negative"),
    (["--objective=mail", "--objective.slope=-1"], "slope finite and not negative"),
    (["--objective=mail", "--objective.beta=5"], "base at has no beta"),
    (["--objective=mail", "--objective.base=mart", "--objective.beta=-5"], "beta must not be negative"),
    (["--objective=wat", "--objective.base=tradez"], "no 'tradez' among the objectives"),
    (["--objective=wat", "--objective.base=gairat"], "base gairat does not give its loss in terms"),
    (["--objective=wat", "--objective.base=_weighted"], "no '_weighted' among the objectives"),
    (["--objective=wat", "--objective.alpha=-1"], r"alpha must lie in \[0, 20\]"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSALS)
def test_what_does_not_fit_is_refused_in_one_line(words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        configure("table1.mwpb_at", {}, words)
    assert "\n" not in str(caught.value)


def test_options_reach_the_base() -> None:
    words = ["--objective=mail", "--objective.base=trades", "--objective.beta=5", "--objective.bias=0"]
    whole = configure("table1.mwpb_at", {}, words)
    assert from_dict(to_dict(whole)) == whole
    config = whole.objective
    assert config == mail.Config(base="trades", beta=5.0, bias=0.0)
    assert config.build().base == trades.Config(beta=5.0).build()
    assert dataclasses.replace(config, beta=None).build().base == trades.Config().build()


def test_refusals_come_before_torch() -> None:
    script = (
        "import sys\n"
        "from mwpb_fast.config import ConfigError\n"
        "from mwpb_fast.options import configure\n"
        f"for words, _ in {REFUSALS!r}:\n"
        "    try:\n"
        "        configure('table1.mwpb_at', {}, words)\n"
        "        sys.exit(f'{words} taken')\n"
        "    except ConfigError:\n"
        "        pass\n"
        "configure('table1.mwpb_at', {}, ['--objective=mail', '--objective.base=mart'])\n"
        "sys.exit('torch' in sys.modules and 'torch is imported' or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_base_whose_attack_loss_is_unknown_cannot_be_weighted_by_wat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_inner").mkdir()
    (tmp_path / "own_inner" / "base.py").write_text(
        "from dataclasses import dataclass\n"
        "from mwpb_fast.inner_losses import dlr\n"
        "from mwpb_fast.objectives import at\n"
        "class Base(at.AT):\n"
        "    inner = staticmethod(dlr)\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Config(at.Config):\n"
        "    def build(self):\n"
        "        return Base()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert mail.Config(base="own_inner.base").build().inner is not at.Config().build().inner
    with pytest.raises(ValueError, match="cannot be weighted"):
        wat.Config(base="own_inner.base")
