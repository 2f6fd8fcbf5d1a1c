"""The trust report: an ordinary net is believed, masked ones are not; numbers by hand; files and refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    one_thread,  # noqa: F401  # an autouse fixture
    run,
    short,  # noqa: F401  # a fixture
    untrained_state,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mwpb_fast import cli
from mwpb_fast.budgets import fixed, margin
from mwpb_fast.config import ConfigError, EvaluationConfig, recipe
from mwpb_fast.data import Config, load_split
from mwpb_fast.evaluation import sharded
from mwpb_fast.evaluation.probes import gradients, weighted
from mwpb_fast.evaluation.request import Request
from mwpb_fast.evaluation.trust import compare, judge, plan, sweep, trust_run
from mwpb_fast.evaluation.trust_report import markdown
from mwpb_fast.runs import checkpoint

DIGITS = EvaluationConfig(eps=Fraction(24, 255), step_size=Fraction(3, 255), subset=100)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    split = load_split(Config(name="digits"), "test")
    return split.images.float() / 255, split.labels


@pytest.fixture(scope="module")
def ordinary() -> nn.Module:
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
    probes = {"weighted": weighted(margin.Config(eps=DIGITS.eps)), "gradients": gradients()}
    return judge(run(model, images, settings, probes=probes, **options), DIGITS)


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


# files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a best checkpoint of an untrained model."""
    checkpoint.save(tmp_path / "checkpoints", "best", 3, 0, untrained_state())
    return tmp_path


SMALL = EvaluationConfig(eps=Fraction(1, 4), step_size=Fraction(1, 32), subset=16)
DEAR = ("pgd50", "pgd100", "pgd20x5")


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("short")
def test_report_is_kept_goes_on_after_a_kill_and_leaves_the_evaluation_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "evaluation-best.json").write_text("mine")
    write = sharded.ShardedAttack.write
    done: list[str] = []

    def bomb(self: sharded.ShardedAttack, *rest: Any) -> None:
        write(self, *rest)
        done.append(self.name)
        if len(done) == 4:
            raise Killed

    monkeypatch.setattr(sharded.ShardedAttack, "write", bomb)
    with pytest.raises(Killed):
        trust_run(Request(folder, SMALL, processes=1, show=False), without=DEAR)
    assert not (folder / "trust-best.json").exists()
    report = trust_run(Request(folder, SMALL, processes=1, show=False), without=DEAR)
    assert len(done) == len(report["attacks"])  # nothing was done twice
    assert json.loads((folder / "trust-best.json").read_text()) == report
    assert (folder / "trust-best.md").read_text() == markdown(report) + "\n"
    assert (folder / "evaluation-best.json").read_text() == "mine"
    assert (report["preview"], report["n"], report["recipe"]) == (True, 16, "digits.mwpb_at")
    assert verdicts(report)["more steps"] == "not run"


def control(folder: Path, kind: str = "evaluation", accuracy: float = 12.5, **changes: Any) -> Path:
    """A run folder with the same checkpoint, and a result about it."""
    if not folder.exists():
        shutil.copytree(folder.parent / "checkpoints", folder / "checkpoints")
    (file,) = (folder / "checkpoints").glob("best-*.pt")
    entry = {"accuracy": accuracy, "interval": [1.0, 20.0], "flags": ""}
    content = {"eps": "1/4", "step_size": "1/32", "n": 7, "recipe": "digits.control_at"}
    content |= {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "attacks": {"natural": entry}}
    (folder / f"{kind}-best.json").write_text(json.dumps(content | changes))
    return folder


@pytest.mark.usefixtures("short")
def test_control_stands_beside_or_is_refused(folder: Path) -> None:
    without = [name for name in plan(SMALL) if name not in ("natural", "pgd10")]
    report = trust_run(Request(folder, SMALL, show=False), without=without, control=control(folder / "a"))
    text = markdown(report)
    assert "12.50 %" in text
    assert "evaluation-best.json, 7 images" in text
    refused = {
        "made with eps 1/8": control(folder / "b", eps="1/8"),
        "made with step_size 1/16, not 1/32": control(folder / "c", step_size="1/16"),
        "not the result": control(folder / "d", eps="x"),
        "is not of best-00003-0000000.pt as it is now": control(folder / "e", sha256="0" * 64),
        "evaluate it first": folder / "f",
        "made on other test images": control(folder / "g", split_sha256="0" * 64),
    }
    for reason, where in refused.items():
        with pytest.raises(ConfigError, match=reason):
            trust_run(Request(folder, SMALL, show=False), without=without, control=where)


@pytest.mark.usefixtures("short")
def test_control_is_that_of_its_present_checkpoint(folder: Path) -> None:
    without = [name for name in plan(SMALL) if name not in ("natural", "pgd10")]
    beside = control(folder / "a", "trust", accuracy=77.0)
    report = trust_run(Request(folder, SMALL, show=False), without=without, control=beside)
    assert report["control"]["attacks"]["natural"]["accuracy"] == 77
    (file,) = (beside / "checkpoints").glob("best-*.pt")
    state = checkpoint.read(file)
    checkpoint.save(file.parent, "best", 4, 0, state | {"epoch": 4}, keep=1)  # trained on since
    with pytest.raises(ConfigError, match=r"trust-best\.json: is not of best-00004-0000000\.pt"):
        trust_run(Request(folder, SMALL, show=False), without=without, control=beside)
    control(beside, accuracy=33.0)
    report = trust_run(Request(folder, SMALL, show=False), without=without, control=beside)
    assert report["control"]["attacks"]["natural"]["accuracy"] == 33


def test_a_run_is_judged_at_its_own_radius_unless_another_is_asked_for(folder: Path) -> None:
    own = recipe("digits.mwpb_at").evaluation
    report = trust_run(Request(folder, show=False), without=[name for name in plan(own) if name != "natural"])
    assert (Fraction(report["eps"]), Fraction(report["step_size"])) == (own.eps, own.step_size)
    assert list(report["attacks"]) == ["natural", "weighted", "gradients"]


def test_refusals_come_before_work(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no attack 'cw20' in the trust report"):
        trust_run(Request(folder, SMALL, show=False), without=["cw20"])
    nothing = EvaluationConfig(eps=Fraction(0))
    for refused in (
        lambda: trust_run(Request(folder, nothing, show=False)),
        lambda: judge({"attacks": {}}, nothing),
    ):
        with pytest.raises(ConfigError, match="eps above 0"):
            refused()
    assert not (folder / "evaluation-best").exists()


@pytest.mark.usefixtures("short")
def test_command_prints_and_saves_and_ends_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next((folder / "checkpoints").glob("*.pt"))
    without = ",".join(name for name in plan(SMALL) if name not in ("natural", "pgd20"))
    words = ["trust", str(file), "--recipe", "digits.mwpb_at", "--eps", "1/4", "--step-size", "1/32"]
    words += ["--subset", "16", "--without", without]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "# Trust report: digits.mwpb_at" in out
    assert "- not run: PGD to AutoAttack: without aa" in out
    assert json.loads((file.parent / f"trust-{file.stem}.json").read_text())["n"] == 16
    assert cli.main(["trust", str(file), "--without", "nope"]) == 2
    assert cli.main(["trust", str(file), "--epochs", "3"]) == 2


def test_evaluate_command_takes_own_radii_and_the_costly_subset(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((folder / "checkpoints").glob("*.pt"))
    words = ["evaluate", str(file), "--recipe", "digits.mwpb_at", "--subset", "12", "--costly-subset", "4"]
    assert cli.main([*words, "--attacks", "natural,pgd2@3/255:1/255,spsa1", "--eps", "1/8"]) == 0
    result = json.loads((file.parent / f"evaluation-{file.stem}.json").read_text())
    spsa, pgd = result["attacks"]["spsa1"], result["attacks"]["pgd2@3/255:1/255"]
    assert (spsa["n"], spsa["eps"], pgd["n"], pgd["eps"], pgd["step_size"]) == (4, "1/8", 12, "1/85", "1/255")
    assert result["worst"]["of"] == ["natural"]
    assert result["worst_common"]["of"] == ["natural", "spsa1"]
    assert all("/" not in path.name for path in (file.parent / f"evaluation-{file.stem}").iterdir())
    out = capsys.readouterr().out
    assert "worst of natural, spsa1, on 4 images" in out
    assert "linf 1/85" in out
