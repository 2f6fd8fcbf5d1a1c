"""aa-fast: a prefilter and standard AutoAttack on what withstands it, told apart from AutoAttack's own verdict."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from evaluate_cases import PRECISION, Wrap, config, flags_of, labelled, linear, run
from evaluate_cases import one_thread as one_thread  # an autouse fixture
from evaluate_cases import short as short  # a fixture
from torch import nn

from mwpb_fast.engine.net import EagerNet
from mwpb_fast.evaluation import prefilter
from mwpb_fast.evaluation.contract import AttackSetting
from mwpb_fast.evaluation.score import format_table
from mwpb_fast.evaluation.watched import Watched

SETTING = AttackSetting(Fraction(1, 50), Fraction(1, 200), PRECISION)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_the_nearest_boundary_of_a_linear_model_comes_first(norm: str, dual: int) -> None:
    model = linear()
    x = torch.rand(6, 3, 4, 4)
    y = model(x).argmax(1)
    order = prefilter.malt_order(EagerNet(model, PRECISION), x, y, norm)
    assert order.shape == (6, 9)
    weight = model[1].weight.detach()  # type: ignore[index]
    logits = model(x).detach()
    for i, label in enumerate(y.tolist()):
        others = [j for j in range(10) if j != label]
        distance = {
            j: ((logits[i, label] - logits[i, j]) / (weight[label] - weight[j]).norm(dual)).item() for j in others
        }
        assert order[i].tolist() == sorted(others, key=distance.__getitem__)


def test_a_class_that_is_ruled_out_comes_last() -> None:
    model = linear(4)
    odd = Wrap(model, lambda m, x: m(x).index_fill(1, torch.tensor([2]), -torch.inf))
    x = torch.rand(5, 3, 4, 4)
    y = odd(x).argmax(1)
    order = prefilter.malt_order(EagerNet(odd, PRECISION), x, y, "linf")
    assert order[:, -1].tolist() == [2] * 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_it_finds_is_in_the_ball_and_as_near_as_a_linear_model_has_it(norm: str) -> None:
    model, dual = linear(3), 1 if norm == "linf" else 2
    x = 0.3 + 0.4 * torch.rand(64, 3, 4, 4)
    logits = model(x).detach()
    y = logits.argmax(1)
    weight = model[1].weight.detach()  # type: ignore[index]
    gaps = torch.stack([(logits.gather(1, y[:, None])[:, 0] - logits[:, j]) for j in range(3)], 1)
    sizes = torch.stack([(weight[y] - weight[j]).norm(dual, dim=1) for j in range(3)], 1)
    least = torch.where(sizes > 0, gaps / sizes, torch.inf).amin(1)
    eps = least.median().item()
    x_adv = prefilter.find(EagerNet(model, PRECISION), x, y, eps, norm)
    moved = (x_adv - x).flatten(1)
    assert (moved.norm(float("inf") if norm == "linf" else 2, dim=1) <= eps + 1e-6).all()
    lost = model(x_adv).argmax(1) != y
    clear = (least / eps - 1).abs() > 0.01
    assert torch.equal(lost[clear], (least < eps)[clear])


@pytest.mark.usefixtures("short")
def test_it_says_what_autoattack_says_and_is_not_taken_for_it(tmp_path: Path) -> None:
    model = network()
    images, settings = labelled(model), config("natural", "aa-fast", "aa", "aa-fast@1/60")
    result = run(model, images, settings, folder=tmp_path / "e")
    fast, standard = result["attacks"]["aa-fast"], result["attacks"]["aa"]
    assert 0 < standard["accuracy"] < fast["after"]["clean"]
    assert abs(fast["correct"] - standard["correct"]) <= 1
    after = fast["after"]
    assert list(after) == ["clean", "prefilter", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert sorted(after.values(), reverse=True) == list(after.values())
    assert after["clean"] - after["prefilter"] >= 0.8 * (after["clean"] - after["square"])
    assert fast["preview"] is True
    assert set(fast["stages"]) == {"prefilter", "standard"}
    assert "preview" not in standard
    assert result["worst"]["of"] == ["natural", "aa"]
    text = format_table(result)
    assert "aa-fast (a preview)" in text
    settled = round((after["clean"] - after["prefilter"]) * 0.4)
    assert f"the prefilter settled {settled} of 35 images in" in text
    assert f"; aa took {standard['seconds']:.1f} s" in text
    assert len(list((tmp_path / "e").iterdir())) == 4
    # alone, the standard attack takes nothing of the preview's
    (tmp_path / "e").joinpath(next(p.name for p in (tmp_path / "e").glob("aa-[0-9a-f]*"))).unlink()
    assert flags_of(run(model, images, config("aa"), folder=tmp_path / "e"))["aa"] == standard["flags"]


@pytest.mark.usefixtures("short")
def test_the_plain_model_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefilter that finds nothing changes no verdict, nor does one that is mistaken."""
    model = network()
    images = labelled(model)
    expected = flags_of(run(model, images, config("aa")))["aa"]

    def useless(net: object, x: torch.Tensor, *rest: object) -> torch.Tensor:
        return x.clone()

    monkeypatch.setattr(prefilter, "find", useless)
    result = run(model, images, config("aa-fast"))["attacks"]["aa-fast"]
    assert result["flags"] == expected
    assert result["after"]["prefilter"] == result["after"]["clean"]


@pytest.mark.usefixtures("short")
def test_where_nothing_is_left_there_is_nothing_to_do() -> None:
    model = linear()
    result = run(model, labelled(model), config("aa-fast@1/2"))["attacks"]["aa-fast@1/2"]
    assert (result["accuracy"], list(result["after"])) == (0, ["clean", "prefilter"])
    assert list(result["stages"]) == ["prefilter"]


def test_its_net_is_the_twin_or_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwpb_fast.engine.processor.cpu_has_bf16", lambda: False)
    x = torch.rand(8, 3, 4, 4)
    for model, said in (
        (network(), "its twin in float32"),
        (Wrap(linear(), lambda m, x: m(x) if x.sum() > 0 else m(-x)), "the model itself"),
    ):
        watched = Watched(model, torch.contiguous_format, x.device)
        net, which = prefilter.fast_net(watched, x, SETTING)
        assert which == said
        before = watched.forwards
        torch.testing.assert_close(net.logits(x), model(x).detach(), rtol=1e-4, atol=1e-5)
        net.input_grad(x, prefilter.towards(torch.zeros(8).long(), torch.ones(8).long()))
        assert watched.forwards == before + 16
