"""WAT, MAIL and GAIRAT: hand-computed weights, gradients with their detach rules, what they refuse."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mwpb_fast.config import ConfigError, from_dict, to_dict
from mwpb_fast.objectives import at, gairat, mail, mart, trades, wat
from mwpb_fast.options import configure

P = (0.7, 0.2, 0.1)
P_ADV = (0.5, 0.3, 0.2)  # margin 0.2 for class 0, -0.2 for class 1
BASES = ("at", "trades", "mart")
COUNT = "--attack.count_correct=true"


class Table(torch.nn.Module):
    """A model that answers with the rows that its input is made of: x are the logits themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def log(p: tuple[float, ...]) -> Tensor:
    return torch.tensor([p]).log()


def loss_at(config: Any, label: int) -> float:
    return config.build().outer(Table(), log(P), log(P_ADV), torch.tensor([label])).item()


# hand values --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("alpha", "label", "weight"),
    [(0.5, 0, 0.904837), (2.0, 0, 0.670320), (0.5, 1, 1.105171), (2.0, 1, 1.491825), (0.0, 0, 1.0)],
)
def test_wat_has_the_hand_computed_weights(alpha: float, label: int, weight: float) -> None:
    ce, natural = -math.log(P_ADV[label]), -math.log(P[label])
    assert loss_at(wat.Config(alpha=alpha), label) == pytest.approx(weight * ce, rel=2e-6)
    on_trades = wat.Config(base="trades", alpha=alpha, beta=5.0)
    assert loss_at(on_trades, label) == pytest.approx(natural + 5 * weight * 0.0851228, rel=2e-6)


@pytest.mark.parametrize(
    ("bias", "slope", "label", "three_w"),
    [
        (-0.5, 10.0, 0, 0.00273315),
        (0.0, 2.0, 0, 1.2039370),
        (-0.5, 10.0, 1, 0.1422776),
        (0.0, 2.0, 1, 1.7960630),
    ],
)
def test_mail_has_the_hand_computed_weights(bias: float, slope: float, label: int, three_w: float) -> None:
    options: dict[str, Any] = dict(bias=bias, slope=slope)
    ce, natural = -math.log(P_ADV[label]), -math.log(P[label])
    assert loss_at(mail.Config(**options), label) == pytest.approx(three_w * ce, rel=2e-6)
    on_trades = mail.Config(base="trades", beta=5.0, **options)
    assert loss_at(on_trades, label) == pytest.approx(natural + 5 * three_w * 0.0851228, rel=2e-6)
    boosted = -math.log(P_ADV[label]) - math.log(1.0001 - P_ADV[1 - label])
    rest = 5 * 0.0851228 * (1.0000001 - P[label])
    on_mart = mail.Config(base="mart", beta=5.0, **options)
    assert loss_at(on_mart, label) == pytest.approx(three_w * boosted + rest, rel=2e-6)


def weights_of(objective: Any, logits: Tensor, y: Tensor, notes: dict[str, Tensor] | None = None) -> list[float]:
    """What the outer loss makes of each sample alone, the others being classified with a loss of zero."""
    result = []
    for i, label in enumerate(y.tolist()):
        lone = torch.zeros(logits.shape)
        lone[torch.arange(len(y)), y] = 200.0
        lone[i] = logits[i]
        loss = objective.outer(Table(), lone, lone, y, notes)
        result.append(loss.item() * len(y) / -logits[i].log_softmax(0)[label].item())
    return result


@pytest.mark.parametrize(
    ("Lambda", "expected"),
    [(-1.0, (2.680369, 0.319615, 0.000016)), (0.0, (1.999910, 1.0, 0.000091))],
)
def test_gairat_has_the_hand_computed_weights(Lambda: float, expected: tuple[float, ...]) -> None:
    notes = {"hits": torch.tensor([0.0, 5.0, 10.0]) / 10}
    objective = gairat.Config(Lambda=Lambda).build()
    weights = weights_of(objective, log(P_ADV).expand(3, 3), torch.tensor([0, 1, 2]), notes)
    assert weights == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("Lambda", [-1.0, -60.0, 30.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gairat_with_equal_counts_is_its_base(Lambda: float, share: float) -> None:
    """Also where every weight before the normalisation is too small for float32."""
    z, y = torch.randn(6, 10), torch.randint(10, (6,))
    loss = gairat.Config(Lambda=Lambda).build().outer(Table(), z, z, y, {"hits": torch.full((6,), share)})
    assert loss.item() == pytest.approx(at.Config().build().outer(Table(), z, z, y).item(), rel=1e-6)


def test_gairat_keeps_the_order_of_weights_too_small_for_float32() -> None:
    """At the certain end (1 + tanh) cancels: the exact ratios are exp(4) for a difference of 4 in 2u."""
    shares = torch.tensor([0.6, 0.8, 1.0])
    weight = gairat.Config(Lambda=-60.0).build().weight(torch.zeros(3, 2), torch.zeros(3).long(), {"hits": shares})
    assert weight.mean().item() == pytest.approx(1, rel=1e-5)
    assert (weight[:-1] / weight[1:]).tolist() == pytest.approx([math.exp(4)] * 2, rel=1e-3)


def test_gairat_without_the_count_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"count_correct=True"):
        loss_at(gairat.Config(), 0)


@pytest.mark.parametrize("slope", [0.0, 2.0, 10.0, 1000.0])
def test_normalised_mail_weights_have_mean_one(slope: float) -> None:
    z, y = 4 * torch.randn(32, 10), torch.randint(10, (32,))
    config = mail.Config(slope=slope, weights="normalised")
    weight = config.build().weight(z, y)
    assert weight.mean().item() == pytest.approx(1, rel=1e-5)
    plain = torch.sigmoid(-slope * (margin64(z.double(), y) + 0.5))
    if plain.mean() > 0:
        torch.testing.assert_close(weight.double(), plain / plain.mean(), rtol=1e-3, atol=1e-6)
    certain = torch.zeros(4, 3)
    certain[:, 0] = 50.0  # margin 1: at slope 1000 every sigmoid underflows to 0
    assert config.build().weight(certain, torch.zeros(4, dtype=torch.int64)).tolist() == [1.0] * 4


# gradients ----------------------------------------------------------------------------------------------------
def margin64(z: Tensor, y: Tensor) -> Tensor:
    p = z.softmax(1)
    others = p.scatter(1, y[:, None], -1)
    return p.gather(1, y[:, None]).squeeze(1) - others.max(1).values


def terms64(base: str, z: Tensor, a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rest and the robust terms of a base, beta 5, from the equations."""
    p, q = z.softmax(1), a.softmax(1)
    ce = torch.nn.functional.cross_entropy
    if base == "at":
        return z.new_zeros(()), ce(a, y, reduction="none")
    if base == "trades":
        return ce(z, y), 5 * (p * (p.log() - q.log())).sum(1)
    boosted = ce(a, y, reduction="none") - (1.0001 - q.scatter(1, y[:, None], -1).max(1).values + 1e-12).log()
    divergence = (p * (p.log() - (q + 1e-12).log())).sum(1)
    return 5 * (divergence * (1.0000001 - p.gather(1, y[:, None]).squeeze(1))).mean(), boosted


def wat64(a: Tensor, y: Tensor, hits: Tensor) -> Tensor:
    return torch.exp(-2 * margin64(a, y))


def mail64(a: Tensor, y: Tensor, hits: Tensor) -> Tensor:
    return 3 * torch.sigmoid(-2 * (margin64(a, y) - 0.1)).detach()


def mail_mean64(a: Tensor, y: Tensor, hits: Tensor) -> Tensor:
    w = mail64(a, y, hits)
    return w / w.mean()


def gairat64(a: Tensor, y: Tensor, hits: Tensor) -> Tensor:
    w = (1 + torch.tanh(-1 + 5 * (1 - 2 * hits))) / 2
    return w / w.mean()


def wat_detached64(a: Tensor, y: Tensor, hits: Tensor) -> Tensor:
    return wat64(a, y, hits).detach()


def mail_attached64(a: Tensor, y: Tensor, hits: Tensor) -> Tensor:
    return 3 * torch.sigmoid(-2 * (margin64(a, y) - 0.1))


Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
MAIL: dict[str, Any] = dict(bias=0.1, slope=2.0)
# a configuration of each, its weights, and the weights with the other detach rule
CASES: list[tuple[Any, dict[str, Any], Weigh, Weigh | None]] = [
    (wat.Config, dict(alpha=2.0), wat64, wat_detached64),
    (mail.Config, MAIL, mail64, mail_attached64),
    (mail.Config, dict(MAIL, weights="normalised"), mail_mean64, None),
    (gairat.Config, {}, gairat64, None),
]


def batch64(classes: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = (2 * torch.randn(17, classes, generator=generator)).double().requires_grad_()
    a = (2 * torch.randn(17, classes, generator=generator)).double().requires_grad_()
    y = torch.randint(classes, (17,), generator=generator)
    return z, a, y, torch.randint(11, (17,), generator=generator) / 10


def base_config(make: Any, base: str, options: dict[str, Any]) -> Any:
    return make(base=base, beta=None if base == "at" else 5.0, **options)


def relative_error(got: Any, want: Any) -> float:
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if w is not None]
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in pairs)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("make", "options", "weigh", "wrong"), CASES)
def test_outer_gradients_are_those_of_the_equations(
    make: Any, options: dict[str, Any], weigh: Weigh, wrong: Weigh | None, base: str, classes: int
) -> None:
    """The logits reach the objective as views that are not contiguous."""
    z, a, y, hits = batch64(classes)

    def gradients(weigh: Weigh) -> tuple[Tensor, Any]:
        rest, robust = terms64(base, z, a, y)
        loss = rest + (weigh(a, y, hits.double()) * robust).mean()
        return loss, torch.autograd.grad(loss, (z, a), allow_unused=True)

    z32, a32 = (t.detach().float().t().contiguous().requires_grad_() for t in (z, a))
    assert not z32.t().is_contiguous()
    loss = base_config(make, base, options).build().outer(Table(), z32.t(), a32.t(), y, {"hits": hits})
    got = [None if g is None else g.t() for g in torch.autograd.grad(loss, (z32, a32), allow_unused=True)]
    want_loss, want = gradients(weigh)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    assert [g is None for g in got] == [w is None for w in want]
    assert relative_error(got, want) < 1e-5
    if wrong is not None:
        assert relative_error(got, gradients(wrong)[1]) > 1e-2


def inner64(base: str, z: Tensor, clean: Tensor, y: Tensor) -> Tensor:
    if base == "trades":
        p = clean.softmax(1)
        return (p * (p.log() - z.log_softmax(1))).sum(1)
    return torch.nn.functional.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_wat_attacks_the_weighted_loss_through_the_weight(base: str, dtype: torch.dtype) -> None:
    """Summed, not averaged: each sample's gradient is its own."""
    clean, logits, y, _ = batch64()
    clean, logits = clean.detach().to(dtype), logits.detach().to(dtype)
    leaf = logits.double().requires_grad_()

    def gradient(weight: Tensor) -> Any:
        return torch.autograd.grad((weight * inner64(base, leaf, clean.double(), y)).sum(), leaf)

    objective = base_config(wat.Config, base, dict(alpha=2.0)).build()
    assert objective.uses_clean == (base == "trades")
    got = objective.inner(logits, clean if objective.uses_clean else None, y)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert relative_error([got], gradient(wat64(leaf, y, y))) < tolerance
    assert relative_error([got], gradient(wat_detached64(leaf, y, y))) > 1e-2
    alone = objective.inner(logits[3:4], clean[3:4] if objective.uses_clean else None, y[3:4])
    torch.testing.assert_close(alone, got[3:4])


@pytest.mark.parametrize("base", BASES)
def test_wat_with_alpha_zero_is_its_base(base: str) -> None:
    z, a, y, _ = batch64()
    z, a = z.detach().float(), a.detach().float()
    plain = {"at": at, "trades": trades, "mart": mart}[base].Config().build()
    weighted = wat.Config(base=base, alpha=0.0).build()
    torch.testing.assert_close(weighted.outer(Table(), z, a, y), plain.outer(Table(), z, a, y))
    torch.testing.assert_close(weighted.inner(a, z, y), plain.inner(a, z, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("make", [mail.Config, gairat.Config])
def test_mail_and_gairat_attack_as_their_base(make: Any, base: str) -> None:
    plain, objective = {"at": at, "trades": trades, "mart": mart}[base].Config().build(), make(base=base).build()
    assert objective.inner is plain.inner
    assert objective.uses_clean == plain.uses_clean


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("make", "options", "weigh", "wrong"), CASES)
def test_under_autocast_the_loss_is_that_of_the_rounded_logits(
    make: Any, options: dict[str, Any], weigh: Weigh, wrong: Weigh | None, base: str
) -> None:
    model, x, x_adv = torch.nn.Linear(5, 4), torch.randn(9, 5), torch.randn(9, 5)
    y, hits = torch.randint(4, (9,)), torch.randint(11, (9,)) / 10
    with torch.autocast("cpu", torch.bfloat16):
        loss = base_config(make, base, options).build().outer(model, x, x_adv, y, {"hits": hits})
        z, a = model(x), model(x_adv)
        assert z.dtype == torch.bfloat16
    rest, robust = terms64(base, z.double(), a.double(), y)
    want = rest + (weigh(a.double(), y, hits.double()) * robust).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.isfinite().all()


# refusals -----------------------------------------------------------------------------------------------------
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
    (["--objective=wat", "--objective.base=_weighted"], "has no Config"),
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
