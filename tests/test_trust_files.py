"""Reports of trust as files and as a command: kept, gone on with, beside a control, refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from evaluate_cases import (
    one_thread,  # noqa: F401  # an autouse fixture
    short,  # noqa: F401  # a fixture
    untrained_state,
)
from test_trust import verdicts

from mwpb_fast import cli
from mwpb_fast.config import ConfigError, EvaluationConfig, recipe
from mwpb_fast.data import Images
from mwpb_fast.evaluation import sharded, trust
from mwpb_fast.evaluation.checkpoint import Subject
from mwpb_fast.evaluation.request import Request
from mwpb_fast.evaluation.session import choose
from mwpb_fast.evaluation.trust import judge, plan, probes, trust_run
from mwpb_fast.evaluation.trust_report import markdown
from mwpb_fast.runs import checkpoint


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
    own, state = recipe("digits.mwpb_at").evaluation, untrained_state()
    state["config"]["evaluation"]["subset"] = 16
    checkpoint.save(folder / "checkpoints", "best", 4, 0, state)
    report = trust_run(Request(folder, show=False), without=[name for name in plan(own) if name != "natural"])
    assert (Fraction(report["eps"]), Fraction(report["step_size"])) == (own.eps, own.step_size)
    assert list(report["attacks"]) == ["natural", *probes(recipe("digits.mwpb_at").budget)]


@pytest.mark.parametrize("whole", [0, 64, 8])
def test_the_evaluations_autoattack_is_taken_on_the_images_of_the_report(folder: Path, whole: int) -> None:
    """whole: of which the evaluation is, 0 for all; the report is of 16."""
    request = Request(folder, SMALL, show=False)
    images = Subject(request).images
    assert isinstance(images, Images)
    index, own = choose(images.labels, whole)[0].tolist(), choose(images.labels, 16)[0].tolist()
    result = {"sha256": "a", "split_sha256": "b", "norm": "linf", "eps": "1/4", "n": 16, "preview": True}
    entry = {"eps": "1/4", "flags": "".join("01"[image % 3 == 0] for image in index)}
    found: dict[str, Any] = {**result, "n": len(index), "preview": whole > 0, "attacks": {"aa": entry}}
    (folder / "evaluation-best.json").write_text(json.dumps(found))
    expected = "".join("01"[image % 3 == 0] for image in own) if whole != 8 else ""
    assert trust._autoattack(request, result, images) == expected
    for change in ({"sha256": "c"}, {"eps": "1/5"}, {"attacks": {"aa": entry | {"eps": "1/5"}}}, {"attacks": {}}):
        (folder / "evaluation-best.json").write_text(json.dumps(found | change))
        assert trust._autoattack(request, result, images) == ""
    for damaged in ("", "[]", json.dumps({**found, "attacks": {"aa": {"eps": "1/4", "flags": "1"}}})):
        (folder / "evaluation-best.json").write_text(damaged)
        assert trust._autoattack(request, result, images) == ""


def test_refusals_come_before_work(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no attack 'cw10' in the trust report"):
        trust_run(Request(folder, SMALL, show=False), without=["cw10"])
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
