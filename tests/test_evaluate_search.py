"""What AutoAttack searches on: the folded twin, held to the model, whose word is the last."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    EPS,
    PRECISION,
    Wrap,
    config,
    flags_of,
    labelled,
    linear,
    one_thread,  # noqa: F401  # an autouse fixture
    run,
    short,  # noqa: F401  # a fixture
)
from search_cases import normed, search_of, watched
from torch import Tensor, nn

from mwpb_fast import data
from mwpb_fast.config import ConfigError, EvaluationConfig
from mwpb_fast.engine.precision import full_float32, tf32_convolutions
from mwpb_fast.evaluation import autoattack as aa
from mwpb_fast.evaluation import search as searching
from mwpb_fast.evaluation.score import format_table
from mwpb_fast.evaluation.search import PLAIN, make_search
from mwpb_fast.models import build_model

TWIN = "the folded twin, full float32"


@pytest.fixture
def model() -> nn.Module:
    return normed()


@pytest.mark.usefixtures("short")
def test_flags_on_digits_are_those_of_the_model_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    digits = data.load_split(data.Config(name="digits"), "test")
    model = build_model("smallresnet-4", num_classes=10, channels=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = digits.images[:192].float() / 255, digits.labels[:192]
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y).backward()
        optimizer.step()
    settings = config("aa", "aa-l2", "fab", subset=20)
    twin = run(model.eval(), digits, settings, folder=tmp_path / "e")
    plain = run(model, digits, replace(settings, engine="eager"), folder=tmp_path / "e")
    assert flags_of(twin) == flags_of(plain)
    for name, flags in flags_of(twin).items():
        assert {"0", "1"} == set(flags)
        assert twin["attacks"][name]["after"] == plain["attacks"][name]["after"]
        assert (twin["attacks"][name]["engine"], plain["attacks"][name]["engine"]) == (TWIN, PLAIN)
        assert twin["attacks"][name]["refuted"] == plain["attacks"][name]["refuted"] == 0
    # neither takes the other's shards
    assert len({path.stem for path in (tmp_path / "e").glob("aa-*.json")}) >= 4
    assert f"aa searched on {TWIN}; the model itself judged, in full float32" in format_table(twin)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("wrap", "why"),
    [
        (lambda m, x: m(x) if x.sum() > 0 else -m(x), "torch.fx cannot trace it"),
        (lambda m, x: m(x) + 1e-9 * torch.tensor([float(len(x.tolist()))]), "torch.fx cannot trace it"),
    ],
)
def test_a_model_that_cannot_be_folded_is_searched_on_itself_and_that_is_said(
    model: nn.Module, wrap: Any, why: str
) -> None:
    x, y = torch.rand(12, 1, 10, 10), torch.zeros(12, dtype=torch.int64)
    found = run(Wrap(model, wrap), (x, y), config("natural", "apgd-ce"))
    assert found["attacks"]["apgd-ce"]["engine"] == PLAIN
    assert "engine" not in found["attacks"]["natural"]
    (note,) = [note for note in found["notes"] if "folded twin" in note]
    assert note.startswith("AutoAttack searches on the model itself, which has no folded twin: ")
    assert why in note
    assert note in format_table(found)


@pytest.mark.usefixtures("short")
def test_a_function_and_a_random_model_have_no_twin() -> None:
    weight = torch.randn(48, 10)
    images = (torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64))
    called = run(lambda x: x.flatten(1) @ weight, images, config("apgd-ce"))  # type: ignore[arg-type]
    assert called["notes"] == [
        "AutoAttack searches on the model itself, which has no folded twin: it has no weights"
    ]
    noisy = Wrap(linear(), lambda m, x: m(x) + 0.1 * torch.randn(len(x), 10))
    assert "its logits are random" in run(noisy, images, config("apgd-ce"))["notes"][1]


@pytest.mark.usefixtures("short")
def test_a_twin_that_is_made_wrong_is_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    real = searching.TwinNet._refold
    x = torch.rand(8, 1, 10, 10)

    def wrong(twin: Any) -> None:
        real(twin)
        twin.layers[0].weight32.mul_(-1)

    monkeypatch.setattr(searching.TwinNet, "_refold", wrong)
    found, why = make_search(watched(model), x, PRECISION, 8, False)
    assert found is None
    assert why == "folded, it gives another logits"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("share", [0.01, 0.9])  # 0.01 passes the check at the twin's making, whose bound is 0.02
def test_a_twin_that_goes_wrong_is_left_and_the_flags_are_right(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    target = watched(model)
    x = torch.rand(24, 1, 10, 10)
    y = model(x).argmax(1)
    search, real = search_of(target, x), searching.TwinNet._refold

    def wrong(twin: Any) -> None:
        real(twin)
        twin.layers[-1].weight32.mul_(1 - share)

    monkeypatch.setattr(searching.TwinNet, "_refold", wrong)
    components = ["apgd-ce", "square"]
    found = aa.autoattack(target, x, y, eps=0.02, components=components, search=search)
    plain = aa.autoattack(target, x, y, eps=0.02, components=components)
    assert torch.equal(found.x_adv, plain.x_adv)
    assert "the model itself was searched on" in found.warnings["twin"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("component", aa.STANDARD)
def test_the_model_has_the_last_word_on_what_a_twin_calls_adversarial(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    target = watched(model)
    x = torch.rand(24, 1, 10, 10)
    y = model(x).argmax(1)
    search = search_of(target, x)
    monkeypatch.setattr(search, "holds", lambda images: True)
    right = search.logits
    # everything is adversarial to it: nothing would be attacked at all, and all be called broken
    monkeypatch.setattr(search, "logits", lambda x: right(x).roll(1, 1))
    target.search = search
    found = aa.autoattack(target, x, y, eps=0.05, components=[component], search=search)
    plain = aa.autoattack(target, x, y, eps=0.05, components=[component])
    assert search.refuted == 24
    assert torch.equal(found.correct, plain.correct)
    assert torch.equal(found.correct, target(found.x_adv).argmax(1) == y)


# options --------------------------------------------------------------------------------------------------------


def test_tf32_is_named_is_of_cuda_and_leaves_the_model_in_full_float32(model: nn.Module) -> None:
    images = labelled(linear())
    with pytest.raises(ConfigError, match="TF32 is of CUDA devices"):
        run(linear(), images, config("aa", tf32=True))
    with pytest.raises(ValueError, match="it needs engine=auto"):
        EvaluationConfig(engine="eager", tf32=True)
    with pytest.raises(ValueError, match="engine must be auto or eager"):
        EvaluationConfig(engine="twin")
    target = watched(model)
    assert make_search(target, torch.rand(4, 1, 10, 10), PRECISION, 4, True)[0].name == (  # type: ignore[union-attr]
        "the folded twin, TF32 convolutions"
    )
    conv: Any = torch.backends.cudnn.conv
    before = conv.fp32_precision
    with full_float32():
        with tf32_convolutions():
            assert conv.fp32_precision == "tf32"
            assert torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert conv.fp32_precision == "ieee"
        assert not torch.backends.cudnn.allow_tf32
    assert conv.fp32_precision == before


@pytest.mark.usefixtures("short")
def test_a_class_that_is_ruled_out_is_ruled_out_on_the_twin_too() -> None:
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(10)
            mask[3] = -torch.inf
            return self.linear(x.flatten(1)) + mask

    model = Masked().eval()
    x, y = labelled(model)
    keep = y != 3
    settings = EvaluationConfig(attacks=("aa",), eps=EPS * 2, step_size=Fraction(1, 255))
    found = run(model, (x[keep], y[keep]), settings)
    assert flags_of(found) == flags_of(run(model, (x[keep], y[keep]), replace(settings, engine="eager")))
