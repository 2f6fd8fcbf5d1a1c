"""Mean and deviation among the options in a foreign file: applied where they are clear, else a doubt."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_models import randomize_
from test_weights_found import MEAN, STD, X, fresh, pre

from mwpb_fast import cli
from mwpb_fast.models import build_model, load_weights

GREY = {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}
OURS = {"mean": MEAN, "std": STD}
BOTH = (MEAN, STD)
CLEAR: dict[str, Any] = {
    "args": {"args": Namespace(lr=0.1, mean=MEAN, std=tuple(STD))},
    "hparams": {"hparams": {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}},
    "Lightning's": {"hyper_parameters": {"data_mean": MEAN, "data_std": STD, "normalize": True}},
    "nested": {"config": {"data": {"normalization": OURS}}},
    "a list of transforms": {"cfg": SimpleNamespace(transforms=[{"type": "Flip"}, {"type": "Normalize", **OURS}])},
    "by its name": {"normalize_config": {"mu": MEAN, "sigma": STD}},
    "twice": {"args": Namespace(mean=MEAN, std=STD), "config": {"img_mean": MEAN, "img_std": STD}},
    "a noise beside them": {"args": Namespace(mean=MEAN, std=STD, sigma=0.25)},
}
DOUBTFUL: dict[str, tuple[Any, str]] = {
    "grey levels": ({"img_norm_cfg": GREY}, "img_norm_cfg.mean, img_norm_cfg.std"),
    "one number": ({"args": Namespace(mean=0.5, std=0.5)}, "args.mean, args.std"),
    "no deviation": ({"args": Namespace(mean=MEAN)}, "args.mean"),
    "of one channel": ({"config": {"mean": [0.13], "std": [0.31]}}, "config.mean, config.std"),
    "a flag": ({"args": Namespace(normalize=True)}, "args.normalize"),
    "a flag's text": ({"config": {"normalization": "imagenet"}}, "config.normalization"),
    "zero deviation": ({"args": Namespace(mean=MEAN, std=[0.0] * 3)}, "args.mean"),
}
IDLE: dict[str, Any] = {
    "no options": {},
    "not set": {"args": Namespace(mean=None, std=None, normalize=False, norm="linf")},
    "weights at the start": {"config": {"mean": 0.0, "std": 0.02}},
    "a noise": {"args": Namespace(sigma=0.25)},
    "switched off": {"args": Namespace(mean=MEAN, std=STD, normalize=False)},
    "neutral": {"args": Namespace(mean=[0.0] * 3, std=[1.0] * 3)},
    "a kind of layer": {"config": {"normalization": "batchnorm", "norm_layer": "bn"}},
    "accuracies": {"results": {"mean": [0.5, 0.6, 0.7], "std": [0.1, 0.2, 0.1]}},
    "an optimiser": {"optimizer": {"state": {0: {"mean": torch.rand(3, 3)}}, "param_groups": [{"lr": 0.1}]}},
}


@pytest.mark.parametrize("case", CLEAR)
@pytest.mark.parametrize("given", [False, True])
def test_what_is_clear_is_applied(case: str, given: bool) -> None:
    truth, model = randomize_(fresh(BOTH)).eval(), fresh(BOTH if given else None)
    loaded = load_weights(model, {"state_dict": pre("module.", truth.state_dict())} | CLEAR[case])
    torch.testing.assert_close(model(X), truth(X))
    assert loaded.doubt == ""
    assert "normalised by the file's own mean 0.4, 0.5, 0.45" in str(loaded)


@pytest.mark.parametrize("case", [*DOUBTFUL, *IDLE])
def test_what_is_not_is_named_and_changes_nothing(case: str) -> None:
    truth, model = randomize_(fresh()).eval(), fresh()
    options, named = DOUBTFUL.get(case) or (IDLE[case], "")
    loaded = load_weights(model, {"state_dict": dict(truth.state_dict())} | options)
    assert torch.equal(model(X), truth(X))
    assert loaded.normalize is None
    assert (f"options {named}" in loaded.doubt) is bool(loaded.doubt) is (case in DOUBTFUL)
    assert "\n" not in loaded.doubt


def test_a_files_own_statistics_go_before_its_options() -> None:
    truth = randomize_(fresh(BOTH)).eval()
    own = {"normalize.mean": torch.tensor(MEAN), "normalize.std": torch.tensor(STD), **truth.state_dict()}
    for options, doubt in (
        (OURS, ""),
        ({"mean": STD, "std": MEAN}, "options args.mean"),
        (GREY, "options args.mean"),
    ):
        loaded = load_weights(model := fresh(), {"model": own, "args": Namespace(**options)})
        torch.testing.assert_close(model(X), truth(X))
        assert doubt in loaded.doubt
        assert bool(doubt) is bool(loaded.doubt)
    with pytest.raises(ValueError, match=r"leave --model\.normalize out"):
        load_weights(fresh(BOTH), {"model": truth.state_dict(), "args": {"mean": STD, "std": MEAN}})
    flag = {"model": truth.state_dict(), "args": {"normalize": True}}
    assert load_weights(fresh(BOTH), flag).doubt == "", "the model normalises"


def test_other_options_that_are_clear_too_are_a_doubt() -> None:
    options = {"args": Namespace(**OURS), "config": {"mean": STD, "std": MEAN}}
    loaded = load_weights(fresh(), {"model": fresh().state_dict()} | options)
    assert "args" not in loaded.doubt
    assert "config.mean, config.std" in loaded.doubt


def test_a_model_without_the_layer_may_do_it_itself() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 8)

    loaded = load_weights(Own(), {"state_dict": Own().state_dict(), "args": Namespace(**OURS)})
    assert loaded.normalize is None
    assert "args.mean, args.std" in loaded.doubt


def test_an_evaluation_is_doubtful(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = build_model("smallresnet-16", num_classes=10, channels=1).state_dict()
    words = ["evaluate", str(tmp_path / "w.pt"), "--recipe", "digits.at", "--attacks", "natural", "--subset", "20"]
    torch.save({"state_dict": state, "args": Namespace(normalize=True)}, tmp_path / "w.pt")
    assert cli.main(words) == 1
    assert "warning (normalisation): the file's options args.normalize may" in capsys.readouterr().out
    assert cli.main([*words, "--accept-warnings"]) == 0
    torch.save({"state_dict": state, "args": Namespace(mean=[0.3], std=[0.4])}, tmp_path / "w.pt")
    assert cli.main(words) == 0
    assert "the file's own mean 0.3 and deviation 0.4" in capsys.readouterr().out
