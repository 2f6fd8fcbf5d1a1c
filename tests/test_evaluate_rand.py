"""Randomised models: recognised, attacked along means of gradients, and what their flags say."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_cases import EPS, PRECISION, Wrap, config, flags_of, labelled, linear, package, run
from evaluate_cases import one_thread as one_thread  # an autouse fixture
from torch import Tensor, nn

from mwpb_fast.attacks import pgd
from mwpb_fast.config import ConfigError
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.evaluation import autoattack as aa
from mwpb_fast.evaluation.catalog import find_attack
from mwpb_fast.evaluation.contract import AttackSetting
from mwpb_fast.evaluation.randomised import Averaged, drawn_right
from mwpb_fast.evaluation.score import format_table
from mwpb_fast.inner_losses import carlini_wagner, cross_entropy


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aa.COMPONENTS["apgd-ce-rand"].parameters, "n_iter", 2)  # both share theirs


def noisy(model: nn.Module, x: Tensor) -> Tensor:
    return model(x + 0.1 * torch.randn_like(x))


class Coin(nn.Module):
    """Right on all images, or wrong on all, by chance and whatever they are."""

    def __init__(self, right: float) -> None:
        super().__init__()
        self.right, self.training = right, False

    def forward(self, x: Tensor) -> Tensor:
        first = (torch.rand(len(x)) < self.right).float()
        return torch.stack((first, 1 - first, 0 * first), 1) + 0 * x.sum((1, 2, 3))[:, None]


# recognised -----------------------------------------------------------------------------------------------------

RANDOM: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "noise on the images": noisy,
    "dropout that is on": lambda m, x: m(nn.functional.dropout(x, 0.2, training=True)),
    "one of two models": lambda m, x: m(x) if torch.rand(()) < 0.5 else m(1 - x),
    "a turn by chance": lambda m, x: m(x if random.random() < 0.5 else x.flip(3)),
    "noise of NumPy": lambda m, x: m(x + torch.from_numpy(np.random.randn(*x.shape)).float() / 10),
    "noise on the logits": lambda m, x: m(x) + 0.1 * torch.randn(len(x), 10),
    "now and then": lambda m, x: m(x) * (1 + (torch.rand(len(x), 1) < 0.1)),
}


@pytest.mark.parametrize("how", RANDOM)
def test_a_randomised_model_is_recognised(how: str) -> None:
    model = linear()
    result = run(Wrap(model, RANDOM[how]), labelled(model, 8), config("natural", "pgd2"))
    assert "as aa-rand and pgd20-eot10 do" in result["warnings"]["randomized"]["message"]
    assert "the model's logits are random: a flag is one draw of the prediction" in result["notes"]


def test_a_module_that_draws_in_eval_mode_is_recognised() -> None:
    class Always(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, self.p, training=True)

    model = nn.Sequential(nn.Flatten(), Always(0.3), nn.Linear(48, 10)).eval()
    images = torch.rand(8, 3, 4, 4), torch.arange(8)
    assert list(run(model, images, config("natural", "aa@0"))["warnings"]) == ["randomized"]
    assert run(linear(), images, config("natural", "pgd2-eot3"))["warnings"] == {}


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    """In whatever order, and however far the generator has come."""
    model = linear()
    odd, images = Wrap(model, noisy), labelled(model)
    settings = config("natural", "pgd3-eot2")
    first = flags_of(run(odd, images, settings))
    torch.rand(7)
    state = torch.get_rng_state()
    assert flags_of(run(odd, images, settings, folder=tmp_path / "e")) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert flags_of(run(odd, images, config("pgd3-eot2")))["pgd3-eot2"] == first["pgd3-eot2"]


# means of gradients ---------------------------------------------------------------------------------------------


def test_a_gradient_is_the_mean_by_hand() -> None:
    model, passes = Wrap(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 10)), noisy), 7
    x, y = torch.rand(5, 3, 4, 4), torch.arange(5)
    torch.manual_seed(3)
    found = Averaged(EagerNet(model, PRECISION), passes).input_grad(x, lambda z: cross_entropy(z, None, y))
    torch.manual_seed(3)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for _ in range(passes):
        leaf = x.clone().requires_grad_()
        nn.functional.cross_entropy(model(leaf), y, reduction="sum").backward()
        assert leaf.grad is not None
        total += leaf.grad
    torch.testing.assert_close(found.double(), total / passes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["pgd", "cw"])
def test_pgd_and_cw_step_along_it(name: str) -> None:
    model = Wrap(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 10)), noisy)
    x, y, index = torch.rand(6, 3, 4, 4), torch.arange(6), torch.arange(6)
    attack = find_attack(f"{name}3-eot4")
    setting = attack.setting(AttackSetting(EPS, EPS / 4, PRECISION))
    torch.manual_seed(0)
    outcome = attack.run(model, x, y, index, setting)
    torch.manual_seed(0)
    inner = cross_entropy if name == "pgd" else carlini_wagner
    by_hand = pgd.Config(steps=3, start="uniform", step_size=EPS / 4).build()
    import mwpb_kernels as ops

    net, key = Averaged(EagerNet(model, PRECISION), 4), torch.tensor([ops.derive_seed(0)])
    expected = by_hand(net, (x, y, index), None, torch.full((6,), float(EPS)), inner, key)  # type: ignore[arg-type]
    assert torch.equal(outcome.x_adv, expected)  # type: ignore[arg-type]
    assert outcome.values["right_share"].shape == (6,)


def test_means_find_what_single_gradients_miss() -> None:
    """A model whose gradient is hidden in noise of mean zero: one pass leads nowhere, means lead on."""
    torch.manual_seed(0)
    model = linear()
    images = labelled(model)

    def hidden(m: nn.Module, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) * 0.5
        return m(x) + ((x - x.detach()) * noise).sum((1, 2, 3))[:, None] * torch.linspace(-2, 2, 10)

    odd = Wrap(model, hidden)
    step = Fraction(1, 50)
    result = run(odd, images, config("pgd10@1/10:" + str(step), "pgd10-eot30@1/10:" + str(step)))
    one, many = (entry["accuracy"] for entry in result["attacks"].values())
    assert many <= one - 5


@pytest.mark.parametrize(
    "name", ["natural-eot5", "aa-eot5", "fgsm-eot5", "pgd20-eot1", "pgd20-eot", "pgd5-eot2-eot2"]
)
def test_what_cannot_average_is_no_attack(name: str) -> None:
    with pytest.raises(ConfigError, match="no attack"):
        find_attack(name)


def test_names_go_together() -> None:
    attack = find_attack("pgd20x3-l2-eot10@1/2")
    assert (attack.passes, attack.norm, attack.eps, attack.stepped) == (10, "l2", Fraction(1, 2), 20)
    assert attack.parameters == {"eot": 10}
    assert find_attack("aa-rand-l2").norm == "l2"
    assert find_attack("pgd20").passes == 1


# flags ----------------------------------------------------------------------------------------------------------


def test_a_flag_is_one_draw_and_several_are_counted_beside_it() -> None:
    n = 400
    images = torch.rand(n, 3, 4, 4), torch.zeros(n, dtype=torch.int64)
    result = run(Coin(0.7), images, config("natural", "pgd1-eot20"))
    for entry in result["attacks"].values():
        assert entry["accuracy"] == pytest.approx(70, abs=7)  # three standard deviations; a vote would give 98
    shares = torch.tensor(result["attacks"]["pgd1-eot20"]["values"]["right_share"])
    assert 100 * shares.mean().item() == pytest.approx(70, abs=2)
    assert set((20 * shares).round().int().tolist()) <= set(range(21))
    text = f"drawn again at the images that it ends at: {100 * shares.mean().item():.2f} % right"
    assert text in format_table(result)


def test_the_share_counts_draws() -> None:
    setting = AttackSetting(EPS, EPS, PRECISION, batch_size=3, passes=4)
    answers = iter([True, False, True, True] * 3)

    def turns(m: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(x),), int(next(answers))), 2).float()

    shares = drawn_right(Wrap(linear(), turns), torch.rand(8, 3, 4, 4), torch.ones(8).long(), setting)
    assert shares["right_share"].tolist() == [0.75] * 8


# AutoAttack -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "norm", "eps"), [("aa-rand", "Linf", 0.1), ("aa-rand-l2", "L2", 0.5)])
def test_flags_are_those_of_the_package(name: str, norm: str, eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[package.AutoAttack] = []

    class Noted(package.AutoAttack):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.apgd.n_iter = 2
            made.append(self)

    monkeypatch.setattr(package, "AutoAttack", Noted)
    model = linear()
    odd = Wrap(model, noisy)
    x, y = labelled(model, 24)
    torch.manual_seed(1)
    found = aa.autoattack(odd, x, y, eps=eps, norm=norm.lower(), seed=5, components=aa.RAND)
    torch.manual_seed(1)
    odd(x)  # that of our own
    bare = Noted(odd, norm=norm, eps=eps, seed=5, version="rand")
    x_adv, labels = bare.run_standard_evaluation(x, y)
    assert torch.equal(found.x_adv, x_adv)
    assert torch.equal(found.predicted, labels)
    assert torch.equal(found.correct, labels == y)
    assert list(found.after) == ["clean", "rand"]
    assert bool((found.after["clean"] >= found.correct).all())
    assert all((a.version, a.apgd.eot_iter, a.apgd.n_restarts) == ("rand", 20, 1) for a in made)


def test_every_gradient_is_the_mean_over_twenty_passes() -> None:
    model = linear()
    result = run(Wrap(model, noisy), labelled(model, 8), config("natural", "aa-rand@1/10"))
    attack = result["attacks"]["aa-rand@1/10"]
    assert attack["parameters"]["apgd-dlr-rand"]["eot_iter"] == 20
    assert attack["forwards"] > 8 / 2 * 20 * 3
    assert attack["accuracy"] < result["attacks"]["natural"]["accuracy"]
    assert len(attack["values"]["right_share"]) == 8
    assert result["warnings"] == {}


def test_an_attack_that_does_not_average_is_doubted_beside_it() -> None:
    model = linear()
    result = run(Wrap(model, noisy), labelled(model, 4), config("pgd2", "aa-rand"))
    assert "as aa-rand" in result["warnings"]["randomized"]["message"]


def test_logits_that_say_nothing_are_wrong_there_too() -> None:
    model = linear()
    x, y = torch.rand(6, 3, 4, 4), torch.zeros(6, dtype=torch.int64)
    odd = Wrap(model, lambda m, x: noisy(m, x) * torch.tensor(float("nan")))
    assert run(odd, (x, y), config("aa-rand"))["attacks"]["aa-rand"]["accuracy"] == 0


def test_two_classes_have_no_dlr_loss() -> None:
    assert aa.deviations(2, aa.RAND) == ("without apgd-dlr-rand, whose loss needs 3 classes",)
