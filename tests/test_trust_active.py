"""The active test and the indicators of attack failure: an ordinary net passes all, and a model built to fail one
fails it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from evaluate_cases import (
    PRECISION,
    Wrap,
    one_thread,  # noqa: F401  # an autouse fixture
    run,
)
from test_trust import DIGITS, Fake, Masked, images, ordinary  # noqa: F401  # two are fixtures
from torch import Tensor, nn

from mwpb_fast.budgets import fixed
from mwpb_fast.config import EvaluationConfig
from mwpb_fast.evaluation.contract import AttackSetting
from mwpb_fast.evaluation.planted import Planted, corner
from mwpb_fast.evaluation.trust import judge, probes

ACTIVE, OTHER = "planted examples", "gradients of another function"
INDICATORS = {
    "zero gradients", "noisy gradients", OTHER, "success on the way",
    "an attack that goes back", "an attack that is not done", "another loss",
}  # fmt: skip


def judged(model: nn.Module, pictures: tuple[Tensor, Tensor], **own: Any) -> dict[str, tuple[str, str]]:
    """Verdict and text of each check that natural, PGD-20, CW-20 and the probes allow."""
    asked = EvaluationConfig(
        **{"eps": DIGITS.eps, "step_size": DIGITS.step_size, "subset": 100, **own},
        attacks=("natural", "pgd20", "cw20"),
    )
    report = judge(run(model, pictures, asked, probes=probes(fixed.Config(eps=asked.eps))), asked)
    return {v["check"]: (v["verdict"], v["text"]) for v in report["verdicts"]}


def doubts(found: dict[str, tuple[str, str]]) -> set[str]:
    return {check for check, (verdict, _) in found.items() if verdict == "doubt"}


class Built(nn.Module):
    """A function of images (B, 1, 8, 8) to a margin (B,), as two logits; right where it is not above 0."""

    def __init__(self, margin: Any) -> None:
        super().__init__()
        self.margin = margin
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        margin = self.margin(x)
        return torch.stack([torch.zeros_like(margin), margin], 1)


GRAY = (
    torch.full((60, 1, 8, 8), 0.5) + torch.linspace(-0.01, 0.01, 60)[:, None, None, None],
    torch.zeros(60).long(),
)


def brightness(x: Tensor) -> Tensor:
    """Where the mean of an image near gray stands in a ball of DIGITS.eps about it, from -1 to 1; close to it."""
    return (x.flatten(1).mean(1) - 0.5) / float(DIGITS.eps)


def noisy(x: Tensor) -> Tensor:
    """Waves too small to change a prediction, and so many that they alone make the gradient."""
    return brightness(x) - 3 + 0.002 * torch.sin(3e4 * x).flatten(1).sum(1)


def of_another(x: Tensor) -> Tensor:
    """The value of brightness, the gradient of darkness."""
    other = -brightness(x)
    return other + (brightness(x) - 0.5 - other).detach()


def overshot(x: Tensor) -> Tensor:
    """Wrong in a thin shell of brightness alone, and rising on both sides of it."""
    bright = brightness(x)
    return torch.where(bright > 0.6, bright - 3, bright - 0.3)


def ridge(x: Tensor) -> Tensor:
    """A ridge so narrow that each step falls from it, one way and then the other."""
    across = x[:, 0, ::2].flatten(1).mean(1) - x[:, 0, 1::2].flatten(1).mean(1)
    return 0.01 * brightness(x) - 1 - 9 * (across - 0.3 * float(DIGITS.eps)).abs()


def ladder(x: Tensor) -> Tensor:
    """Each pixel counts once the one before it is bright."""
    bright = (x - x.new_tensor(0.5)).flatten(1) / float(DIGITS.eps)
    open_ = torch.cat([torch.ones_like(bright[:, :1]), (bright[:, :-1] > 0.5).float().cumprod(1)], 1)
    return (bright.clamp(-1, 0.9) * open_).sum(1) - 40


def steep(x: Tensor) -> Tensor:
    """So certain that the cross-entropy's gradient is zero."""
    return 500 * (brightness(x) - 0.5)


def stepped(x: Tensor) -> Tensor:
    """Without a gradient."""
    return (4 * brightness(x)).round() / 4 - 0.4 + 0 * x.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("margin", "fails"),
    [
        (stepped, {ACTIVE, "zero gradients", "noisy gradients", OTHER, "an attack that goes back"}),
        (noisy, {ACTIVE, "noisy gradients", OTHER, "an attack that goes back"}),
        (of_another, {ACTIVE, OTHER, "an attack that goes back"}),
        (overshot, {ACTIVE, "success on the way", "an attack that goes back"}),
        (ridge, {"an attack that goes back"}),
        (ladder, {ACTIVE, "an attack that is not done"}),
        (steep, {ACTIVE, "another loss", "zero gradients", "an attack that goes back"}),
    ],
)
def test_a_model_built_to_fail_an_indicator_fails_it(margin: Any, fails: set[str]) -> None:
    assert doubts(judged(Built(margin), GRAY, subset=0)) == fails


def test_an_ordinary_net_passes_all(ordinary: nn.Module, images: tuple[Tensor, Tensor]) -> None:  # noqa: F811
    found = judged(ordinary, images)
    assert {ACTIVE, *INDICATORS} <= {check for check, (verdict, _) in found.items() if verdict == "ok"}
    assert "PGD-20 finds 100.00 % of the 100 planted, as many random points" in found[ACTIVE][1]


def test_an_evaluation_too_weak_for_the_ball_is_found_out(
    ordinary: nn.Module,  # noqa: F811
    images: tuple[Tensor, Tensor],  # noqa: F811
) -> None:
    found = judged(ordinary, images, step_size=DIGITS.eps / 100)
    assert doubts(found) == {ACTIVE, "an attack that is not done"}


@pytest.mark.parametrize("how", ["scaled", "quantised"])
def test_masked_nets_do_not_let_the_planted_be_found(
    how: str,
    ordinary: nn.Module,  # noqa: F811
    images: tuple[Tensor, Tensor],  # noqa: F811
) -> None:
    verdict, text = judged(Masked(ordinary, how), images)[ACTIVE]
    assert verdict == "doubt"
    assert "PGD-20 finds 0.00 % of the 100 planted" in text


# the planted ----------------------------------------------------------------------------------------------------


def test_what_is_planted_is_in_the_ball_and_of_the_other_class(
    ordinary: nn.Module,  # noqa: F811
    images: tuple[Tensor, Tensor],  # noqa: F811
) -> None:
    x, setting = images[0][:30], AttackSetting(DIGITS.eps, DIGITS.step_size, PRECISION)
    test, index = Planted(corners=16), torch.arange(30)
    readout, point = test._plant(ordinary, x, index, setting)
    assert ((point - x).abs().amax((1, 2, 3)) <= float(DIGITS.eps) + 1e-6).all()
    assert ((point >= 0) & (point <= 1)).all()
    assert not readout(x).argmax(1).any()
    assert readout(point).argmax(1).all()
    torch.testing.assert_close(readout.direction.norm(dim=1), torch.ones(30))
    second = torch.stack([readout(corner(x, index, setting, n)).argmax(1) for n in range(16)]).sum(0)
    assert (second >= 1).all()
    assert second.float().mean() < 1.5  # one, unless the same corner was drawn twice


def test_corners_are_each_image_s_own() -> None:
    setting = AttackSetting(Fraction(1, 8), Fraction(1, 32), PRECISION)
    x, index = torch.full((20, 3, 9, 10), 0.5), torch.arange(20)
    for number in range(4):
        whole = corner(x, index, setting, number)
        assert set((whole - x).abs().unique().tolist()) == {0.125}
        assert torch.equal(corner(x[7:9], index[7:9], setting, number), whole[7:9])
        assert not torch.equal(whole[0], whole[1])
    tiled = corner(x, index, setting, 1)[:, :, :8]
    assert torch.equal(tiled[:, :, ::2, ::2], tiled[:, :, 1::2, 1::2])


def test_a_class_that_is_ruled_out_is_no_hindrance_and_a_constant_lets_nothing_be_planted() -> None:
    ruled_out = Wrap(
        Built(lambda x: brightness(x) - 3), lambda model, x: torch.cat([model(x), model(x)[:, :1] - torch.inf], 1)
    )
    assert not doubts(judged(ruled_out, GRAY, subset=0)) & {ACTIVE, *INDICATORS}
    verdict, text = judged(Built(lambda x: 0 * x.flatten(1).sum(1) - 1), GRAY, subset=0)[ACTIVE]
    assert (verdict, text[-33:]) == ("doubt", "ball: no example could be planted")


# numbers by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "what", "good", "bad", "most", "check"),
    [  # most: so many bad ones of 100 still leave the interval's end at the limit
        ("planted", "found", 1.0, 0.0, 9, ACTIVE),  # of 91 found, up to 95.2 % in the interval; of 90, 94.5 %
        ("slopes", "slope", 0.5, 0.49, 15, OTHER),  # from 9.31 % at 15, from 10.10 % at 16
        ("slopes", "slope", 2.0, 2.01, 15, OTHER),
        ("slopes", "cosine", 0.5, 0.49, 15, "noisy gradients"),
        ("trace", "lost", 0.0, 1.0, 4, "success on the way"),  # from 2.15 % at 5
        ("trace", "backward", 0.33, 0.34, 15, "an attack that goes back"),
        ("trace", "late", 0.15, 0.16, 15, "an attack that is not done"),
    ],
)  # fmt: skip
def test_each_verdict_turns_where_it_says(
    probe: str, what: str, good: float, bad: float, most: int, check: str
) -> None:
    for count, doubted in ((most, set()), (most + 1, {check})):
        attacks = Fake().attacks
        values = {"slopes": ("slope", 1.0, "cosine", 1.0), "trace": ("lost", 0.0, "backward", 0.0, "late", 0.0)}
        values["planted"] = ("planted", 1.0, "found", 1.0, "chance", 0.0)
        for name, entries in values.items():
            fine = {key: [value] * 100 for key, value in zip(entries[::2], entries[1::2], strict=True)}
            attacks[name] = attacks["natural"] | {"values": fine}
        attacks[probe]["values"][what] = [bad] * count + [good] * (100 - count) + [None] * 7
        report = judge({"attacks": attacks}, DIGITS)
        assert {v["check"] for v in report["verdicts"] if v["verdict"] != "ok"} == doubted


def test_slopes_and_the_path_are_measured_as_they_say() -> None:
    """On a linear margin the slope is 1 and all gradients agree; steps that cross the ball gain at first alone."""
    asked = EvaluationConfig(attacks=("natural",), eps=DIGITS.eps, step_size=DIGITS.eps / 2)
    model = Built(lambda x: brightness(x) - 3)
    attacks = run(model, GRAY, asked, probes=probes(fixed.Config(eps=asked.eps)))["attacks"]
    ones = torch.ones(60, dtype=torch.float64)
    for what in ("slope", "cosine"):
        measured = torch.tensor(attacks["slopes"]["values"][what], dtype=torch.float64)
        torch.testing.assert_close(measured, ones, rtol=1e-3, atol=0)
    assert attacks["trace"]["values"] == {"lost": [0.0] * 60, "backward": [0.0] * 60, "late": [0.0] * 60}
    assert attacks["planted"]["flags"] == "0" * 60
