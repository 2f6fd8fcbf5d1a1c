"""The trust report: an ordinary net is believed, masked ones are not; numbers by hand; files and refusals."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from evaluate_cases import (
    one_thread,  # noqa: F401  # an autouse fixture
    run,
    short,  # noqa: F401  # a fixture
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mwpb_fast.budgets import fixed, margin
from mwpb_fast.config import EvaluationConfig
from mwpb_fast.data import Config, load_split
from mwpb_fast.evaluation.probes import gradients, weighted
from mwpb_fast.evaluation.trust import judge, plan, probes, sweep
from mwpb_fast.evaluation.trust_checks import compare
from mwpb_fast.evaluation.trust_report import markdown

DIGITS = EvaluationConfig(eps=Fraction(24, 255), step_size=Fraction(3, 255), subset=100)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    split = load_split(Config(name="digits"), "test")
    return split.images.float() / 255, split.labels


@pytest.fixture(scope="module")
def ordinary() -> nn.Module:
    return trained_on_digits()


@cache
def trained_on_digits() -> nn.Module:
    """A small net trained against one step of the radius, on digits."""
    split = load_split(Config(name="digits"), "train")
    x, y, eps = split.images.float() / 255, split.labels, float(DIGITS.eps)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        leaf = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(leaf), y), leaf)
        x_adv = (x + (leaf.detach() + 1.25 * eps * gradient.sign() - x).clamp(-eps, eps)).clamp(0, 1)
        optimizer.zero_grad()
        cross_entropy(model(x_adv), y).backward()
        optimizer.step()
    return model.eval()


class Masked(nn.Module):
    """The same decisions, or nearly, without the gradients: certain of everything, or blind to small changes."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "scaled":
            return self.model(x) * 1e4
        return self.model((x * 15).round() / 15)


def report_on(
    model: nn.Module, images: tuple[Tensor, Tensor], without: tuple[str, ...] = (), **options: Any
) -> Any:
    names = tuple(name for name in plan(DIGITS) if name not in without)
    settings = EvaluationConfig(attacks=names, eps=DIGITS.eps, step_size=DIGITS.step_size, subset=DIGITS.subset)
    measured = probes(margin.Config(eps=DIGITS.eps))
    return judge(run(model, images, settings, probes=measured, **options), DIGITS)


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    return {verdict["check"]: verdict["verdict"] for verdict in report["verdicts"]}


def test_ordinary_net_is_believed(ordinary: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    report = report_on(ordinary, images)
    assert set(verdicts(report).values()) == {"ok"}, report["verdicts"]
    attacks = report["attacks"]
    assert attacks["natural"]["accuracy"] > 85
    assert 20 < attacks["aa"]["accuracy"] <= attacks["pgd20"]["accuracy"] < attacks["natural"]["accuracy"]
    assert attacks[report["sweep"][-1]]["accuracy"] <= 1
    # what is right has a positive margin, and so the larger ball
    radius, flags = attacks["weighted"]["values"]["radius"], attacks["natural"]["flags"]
    assert all((r > 24 / 255) == (f == "1") for r, f in zip(radius, flags, strict=True))
    assert attacks["weighted"]["accuracy"] <= attacks["pgd20"]["accuracy"]
    assert report["measures"]["radius"]["max"] <= 24 / 255 * 1.787
    text = markdown(report)
    assert "Preview: 100 images" in text
    assert text.count("- ok: ") == len(report["verdicts"])


@pytest.mark.parametrize(
    ("how", "doubted"),
    [
        ("scaled", {"black box against white box", "zero gradients", "PGD to AutoAttack"}),
        ("quantised", {"black box against white box", "zero gradients", "AutoAttack's own warnings"}),
    ],
)
def test_masked_nets_are_doubted(
    how: str, doubted: set[str], ordinary: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    report = report_on(Masked(ordinary, how), images)
    found = {check for check, verdict in verdicts(report).items() if verdict == "doubt"}
    assert doubted <= found, report["verdicts"]
    text = markdown(report)
    assert "- doubt: black box against white box: Square, which sees no gradients, leaves" in text
    assert "images fall to Square alone" in text


def test_what_was_not_run_is_said_so(ordinary: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    far = sweep(DIGITS)[-1]
    found = verdicts(report_on(ordinary, images, without=("aa", "square", far)))
    not_run = {check for check, verdict in found.items() if verdict == "not run"}
    assert not_run == {
        "PGD to AutoAttack", "AutoAttack's own warnings", "black box against white box", "larger radii",
    }  # fmt: skip


# numbers by hand ------------------------------------------------------------------------------------------------


def test_attacks_are_compared_image_by_image() -> None:
    # 6 images fall to the first alone and none to the other: 6 > 1.96 * sqrt(6); with 3 it is 3 < 3.39
    assert compare("0" * 6 + "1" * 4, "1" * 10).clear
    assert not compare("0" * 3 + "1" * 7, "1" * 10).clear
    found = compare("0011", "1101")
    assert (found.points, found.only, found.clear) == (25.0, 2, False)
    assert not compare("1" * 10, "0" * 10).clear


def test_sweep_is_that_of_the_paper_and_goes_on() -> None:
    asked = EvaluationConfig(eps=Fraction(8, 255), step_size=Fraction(1, 255))
    assert sweep(asked) == [
        "pgd20@2/85", "pgd20", "pgd20@2/51", "pgd20@4/85",  # 6, 8, 10, 12
        "pgd20@16/255:4/255", "pgd20@32/255:8/255", "pgd20@64/255:16/255", "pgd20@128/255:32/255",
    ]  # fmt: skip
    assert sweep(EvaluationConfig(eps=Fraction(1, 2), step_size=Fraction(1, 16)))[-1] == "pgd20@1:1/4"
    assert len(plan(asked)) == len(set(plan(asked)))


class Fake:
    """Results of a report with given accuracies of 100 images."""

    def __init__(self, **right: int) -> None:
        names = {**{name: 50 for name in plan(DIGITS)}, "natural": 90, sweep(DIGITS)[-1]: 0, **right}
        attacks: dict[str, Any] = {
            name: {
                "accuracy": float(n), "interval": [n - 1.0, n + 1.0], "flags": "1" * n + "0" * (100 - n),
                "eps": name.partition("@")[2].partition(":")[0] or "8/85", "step_size": "1/85", "warnings": {},
            }
            for name, n in names.items()
        }  # fmt: skip
        attacks["weighted"] = attacks["pgd20"] | {"values": {"radius": [0.1, 0.3]}}
        attacks["gradients"] = attacks["natural"] | {"values": {"zero_share": [0.0] * 99 + [1.0]}}
        self.attacks = attacks

    def doubts(self) -> set[str]:
        report = judge({"attacks": self.attacks}, DIGITS)
        return {check for check, verdict in verdicts(report).items() if verdict == "doubt"}


@pytest.mark.parametrize(
    ("right", "doubted"),
    [
        ({}, set()),
        ({"aa": 40}, set()),
        ({"aa": 39}, {"PGD to AutoAttack"}),
        ({"square": 47}, set()),
        ({"square": 45}, {"black box against white box"}),
        ({"fgsm": 40}, {"one step against many"}),
        ({"pgd100": 46, "square": 46}, {"more steps"}),
        ({"pgd20x5": 46}, {"more starts"}),
        ({sweep(DIGITS)[-1]: 3}, {"larger radii"}),
        ({sweep(DIGITS)[-2]: 60}, {"larger radii"}),
    ],
)
def test_each_verdict_turns_where_it_says(right: dict[str, int], doubted: set[str]) -> None:
    assert Fake(**right).doubts() == doubted


@pytest.mark.parametrize("check", [("pgd20x5", "more starts"), ("pgd100", "more steps"), ("cw20", "another loss")])
@pytest.mark.parametrize(("standard", "verdict"), [(35, "note"), (36, "note"), (37, "doubt"), (None, "doubt")])
def test_a_stronger_pgd_is_a_note_where_autoattack_is_as_strong(
    check: tuple[str, str], standard: int | None, verdict: str
) -> None:
    """In the report, or in the run's evaluation where the report is without."""
    attack, title = check
    for own in (True, False):
        fake = Fake(**{attack: 36, "square": 36})
        aa = fake.attacks.pop("aa")
        flags = "" if standard is None else "1" * standard + "0" * (100 - standard)
        if own and flags:
            fake.attacks["aa"] = aa | {"flags": flags}
        report = judge({"attacks": fake.attacks}, DIGITS, "" if own else flags)
        (found,) = [v for v in report["verdicts"] if v["check"] == title]
        assert found["verdict"] == verdict
        said = f": PGD-20 alone is too weak; AutoAttack leaves {standard}.00 % of these images, and stands"
        assert found["text"].endswith(said) is (verdict == "note")


def test_far_end_is_doubted_where_its_whole_interval_is_above_1_percent() -> None:
    for interval, doubted in (([1.0, 5.0], False), ([1.1, 5.0], True)):
        fake = Fake(**{sweep(DIGITS)[-1]: 2})
        fake.attacks[sweep(DIGITS)[-1]]["interval"] = interval
        (verdict,) = [
            v for v in judge({"attacks": fake.attacks}, DIGITS)["verdicts"] if v["check"] == "larger radii"
        ]
        assert (verdict["verdict"] == "doubt") is doubted
        said = (
            f"2.00 % are right, 95 % interval {interval[0]:.2f} to 5.00 (doubtful where all of that is above 1 %)"
        )
        assert verdict["text"].endswith(said)


def test_zero_gradients_warnings_and_weighted_radii_are_judged() -> None:
    fake = Fake()
    fake.attacks["gradients"]["values"]["zero_share"][:2] = [1.0, 0.5]
    assert fake.doubts() == {"zero gradients"}
    fake = Fake()
    fake.attacks["aa"]["warnings"] = {"randomized": {"message": "it is random", "shards": [0]}}
    assert fake.doubts() == {"AutoAttack's own warnings"}
    fake = Fake()
    fake.attacks["weighted"]["flags"] = "1" * 70 + "0" * 30  # easier balls than the uniform ones
    assert fake.doubts() == {"weighted radii against uniform"}
    measures = judge({"attacks": fake.attacks}, DIGITS)["measures"]
    assert measures["radius"] == {"min": 0.1, "mean": pytest.approx(0.2), "max": 0.3}
    assert (measures["images_without_gradient"], measures["zero_gradient_share"]) == (1.0, 1.0)


def test_probes_measure_what_they_say() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()
    with torch.no_grad():
        model[1].weight[:, :12] = 0  # a quarter of the numbers is not looked at
    x = torch.rand(30, 3, 4, 4)
    y = model(x).argmax(1)
    budgets = {"margin": margin.Config(eps=Fraction(1, 50), alpha=0.7), "fixed": fixed.Config(eps=Fraction(1, 30))}
    probes = {name: weighted(budget) for name, budget in budgets.items()} | {"gradients": gradients()}
    settings = EvaluationConfig(attacks=("natural",), eps=Fraction(1, 50))
    attacks = run(model, (x, y), settings, probes=probes)["attacks"]
    p = model(x).softmax(1)
    others = p.clone()
    others[torch.arange(30), y] = 0
    expected = torch.exp(0.7 * (p[torch.arange(30), y] - others.amax(1))) / 50
    torch.testing.assert_close(torch.tensor(attacks["margin"]["values"]["radius"]), expected.detach())
    assert attacks["margin"]["eps"] == "weighted"
    assert attacks["margin"]["parameters"]["alpha"] == "0.7"
    assert set(attacks["fixed"]["values"]["radius"]) == {torch.tensor(1 / 30).item()}
    assert attacks["gradients"]["values"]["zero_share"] == [0.25] * 30
