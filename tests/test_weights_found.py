"""Weights in files of any shape: the right function, or one line; never another one."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_cases import untrained_state
from test_models import randomize_
from torch import Tensor

from mwpb_fast import cli
from mwpb_fast.models import build_model, load_weights, read_checkpoint
from mwpb_fast.runs import checkpoint

MEAN, STD = [0.4, 0.5, 0.45], [0.2, 0.25, 0.3]
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Weights = dict[str, Any]


def fresh(normalize: Any = None) -> torch.nn.Module:
    return build_model("smallresnet-2", num_classes=5, normalize=normalize).eval()


@pytest.fixture
def normed() -> torch.nn.Module:
    return randomize_(fresh((MEAN, STD))).eval()


def pre(prefix: str, weights: Mapping[str, Tensor]) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def statistics(mean: str, std: str) -> Weights:
    return {mean: torch.tensor(MEAN).view(1, 3, 1, 1), std: torch.tensor(STD).view(3, 1, 1)}


def zeroed(weights: Mapping[str, Tensor]) -> Weights:
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def problem(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


NORMED: dict[str, Callable[[Weights], Weights]] = {
    "on the model": lambda w: w | statistics("mu", "sigma"),
    "beside it": lambda w: pre("model.", w) | statistics("normalize.mean", "normalize.std"),
    "before it": lambda w: pre("1.", w) | statistics("0.mean", "0.std"),
    "before it, in parallel": lambda w: {
        "state_dict": pre("module.1.", w) | statistics("module.0.mean", "module.0.std")
    },
    "twice": lambda w: {
        "model": pre("module.model.", w)
        | pre("module.attacker.model.", w)
        | statistics("module.normalizer.new_mean", "module.normalizer.new_std")
        | statistics("module.attacker.normalize.new_mean", "module.attacker.normalize.new_std")
    },
    "in the model": lambda w: pre("model.", w) | statistics("model.normalizer.mean", "model.normalizer.std"),
    "beside the dictionary": lambda w: {"state_dict": w, "mean": MEAN, "std": tuple(STD)},
    "in a dictionary of its own": lambda w: {"state_dict": w, "normalize": {"mean": MEAN, "std": STD}},
    "compiled": lambda w: (
        pre("model._orig_mod.", w) | statistics("_orig_mod.normalize.mu", "_orig_mod.normalize.sigma")
    ),
}
PLAIN: dict[str, Callable[[Weights], Weights]] = {
    "SWA": lambda w: {"n_averaged": torch.tensor(5), **pre("module.", w)},
    "a profiler's": lambda w: w | {"total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)},
    "Lightning": lambda w: {"state_dict": pre("model.", w) | {"criterion.weight": torch.ones(5)}, "lr": 0.1},
    "DeepSpeed": lambda w: {
        "module": w,
        "global_steps": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    },
    "an average": lambda w: {"model_state_dict": pre("module.0.", w), "unaveraged_model_state_dict": zeroed(w)},
    "a name for the model": lambda w: {
        "model": "resnet18",
        "ema": 0.999,
        "normalize": True,
        "classes": 10,
        "net": w,
    },
    "compiled blocks": lambda w: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in w.items()},
}
REFUSED: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "two sets": (
        lambda w: {"state_dict": w, "state_dict_ema": zeroed(w)},
        "differ: state_dict, state_dict_ema; choose",
    ),
    "teacher": (lambda w: pre("student.", w) | pre("teacher.", zeroed(w)), "they differ: student, teacher"),
    "a noise layer": (lambda w: w | {"noise.sigma": torch.rand(3)}, r"unexpected noise\.sigma"),
    "a noise layer of two": (lambda w: w | statistics("noise.mean", "noise.std"), "unexpected noise"),
    "another layer": (lambda w: pre("1.", w) | {"2.weight": torch.eye(5)}, r"unexpected 2\.weight"),
    "grey levels": (
        lambda w: w | {"mean": torch.full((3,), 125.0), "std": torch.full((3,), 63.0)},
        r"not for .*\[0, 1\]",
    ),
    "no mean": (lambda w: w | {"std": torch.full((3,), 0.25)}, "std for normalisation, and no mean"),
    "no deviation": (lambda w: w | {"std": torch.zeros(3), "mean": torch.zeros(3)}, r"not for images"),
    "two channels": (lambda w: w | {"std": torch.ones(2), "mean": torch.zeros(2)}, "2 numbers for 3 channels"),
    "two means": (
        lambda w: w | statistics("mean", "std") | {"mu": torch.rand(3), "sigma": torch.ones(3)},
        "disagree",
    ),
    "quantised": (
        lambda w: {k: (v * 99).to(torch.int8) for k, v in w.items()},
        "wrong type .*int8 for torch.float32",
    ),
    "sparse": (lambda w: {k: v.to_sparse() for k, v in w.items()}, "wrong type .*torch.sparse_coo"),
    "without numbers": (lambda w: {k: v.to("meta") for k, v in w.items()}, "without numbers"),
    "compiled twice": (lambda w: w | pre("_orig_mod.", w), "occurs twice, compiled and not"),
}


@pytest.mark.parametrize("shape", NORMED)
@pytest.mark.parametrize("given", [False, True])
def test_a_files_normalisation_is_applied(shape: str, given: bool, normed: torch.nn.Module) -> None:
    model = fresh((MEAN, STD) if given else None)
    loaded = load_weights(model, NORMED[shape](dict(normed.state_dict())))
    torch.testing.assert_close(model(X), normed(X))
    assert "normalised by the file's own mean 0.4, 0.5, 0.45" in str(loaded)


@pytest.mark.parametrize("shape", PLAIN)
def test_the_shape_of_a_file_changes_nothing(shape: str) -> None:
    truth, model = randomize_(fresh()).eval(), fresh()
    load_weights(model, PLAIN[shape](dict(truth.state_dict())))
    assert torch.equal(model(X), truth(X))


@pytest.mark.parametrize("shape", REFUSED)
def test_what_would_be_another_function_is_refused(shape: str, normed: torch.nn.Module) -> None:
    change, reason = REFUSED[shape]
    model = fresh()
    before = model(X)
    with pytest.raises(ValueError, match=reason) as caught:
        load_weights(model, change(dict(normed.state_dict())))
    assert "\n" not in str(caught.value)
    assert torch.equal(model(X), before)


def test_one_of_several_is_chosen(normed: torch.nn.Module) -> None:
    weights = dict(normed.state_dict())
    content = {"state_dict": zeroed(weights), "state_dict_ema": pre("module.", weights)}
    model = fresh((MEAN, STD))
    assert load_weights(model, content, "state_dict_ema").place == "state_dict_ema.module"
    assert torch.equal(model(X), normed(X))
    both = pre("student.", weights) | pre("teacher.", zeroed(weights)) | {"head.bias": torch.ones(3)}
    loaded = load_weights(model := fresh((MEAN, STD)), both, "student")
    assert torch.equal(model(X), normed(X))
    assert "head.bias" in loaded.left_out
    with pytest.raises(
        ValueError, match=r"no weights at 'ema'; there are some at state_dict, state_dict_ema\.module"
    ):
        load_weights(fresh(), content, "ema")


@pytest.mark.parametrize("seed", range(60))
def test_random_files_give_the_function_or_one_line(seed: int, normed: torch.nn.Module) -> None:
    """Random prefixes and dictionaries around the weights, random things beside them."""
    draw = random.Random(seed)
    words = [
        "module",
        "model",
        "net",
        "backbone",
        "0",
        "1",
        "_orig_mod",
        "encoder",
        "x1",
        "attacker",
        "wrapped_model",
    ]
    path = [draw.choice(words) for _ in range(draw.randrange(4))]
    prefix = "".join(f"{part}." for part in path)
    weights, harmful = pre(prefix, normed.state_dict()), False
    parent = "".join(f"{part}." for part in path[:-1])
    mean, std = draw.choice([("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std")])
    place = draw.choice([prefix, parent, f"{prefix}normalize.", f"{parent}normalizer.", f"{parent}norm."])
    weights |= statistics(place + mean, place + std)
    if draw.random() < 0.5:
        name = draw.choice(
            ["n_averaged", f"{prefix}total_ops", "criterion.weight", "noise.sigma", "head.bias", "stdx"]
        )
        harmful = name in ("noise.sigma", "head.bias", "stdx") or (
            name.startswith("crit") and path in ([], ["_orig_mod"])
        )
        weights[name] = torch.rand(3)
    items = list(weights.items())
    draw.shuffle(items)
    content: Any = dict(items)
    for _ in range(draw.randrange(3)):
        others = {"epoch": 3, "best": np.float64(0.5), "args": argparse.Namespace(lr=0.1), "config": {"lr": 0.1}}
        content = {draw.choice(["state_dict", "model", "net", "ema", "weights", "module"]): content, **others}
    model = fresh()
    told = problem(lambda: load_weights(model, content))
    assert bool(told) is harmful, told
    assert "\n" not in told
    if not harmful:
        torch.testing.assert_close(model(X), normed(X))


# files ----------------------------------------------------------------------------------------------------------


def test_scalars_and_options_beside_weights_are_read(tmp_path: Path) -> None:
    weights = dict(fresh().state_dict())
    others = {
        "args": argparse.Namespace(lr=0.1, eps=8),
        "best": np.float64(0.5),
        "n": np.int64(3),
        "f": np.float32(1),
    }
    torch.save({"state_dict": weights, **others}, tmp_path / "w.pt")
    read = read_checkpoint(tmp_path / "w.pt")
    assert (read["best"], read["n"], read["args"].eps) == (0.5, 3, 8)
    load_weights(fresh(), read)


@pytest.mark.filterwarnings("error")
def test_pickle_protocols_and_programs_are_named(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        torch.save({"a": torch.zeros(2)}, tmp_path / "p.pt", pickle_protocol=protocol)
        told = problem(lambda: read_checkpoint(tmp_path / "p.pt"))
        assert ("is written in pickle protocol 4 or later; write it again" in told) is (protocol > 3)


def test_files_of_ours_are_known_by_their_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = untrained_state()
    marked, foreign = checkpoint.MARK | state, {"state_dict": state["model"], "config": {"lr": 1}, "model": "x"}
    assert checkpoint.is_ours(marked)
    assert checkpoint.is_ours(state)  # of before the mark
    assert not checkpoint.is_ours(foreign)
    assert not checkpoint.is_ours({key: value for key, value in state.items() if key != "classes"})
    torch.save({**marked, "mwpb_fast_checkpoint": 9}, tmp_path / "later.pt")
    assert cli.main(["evaluate", str(tmp_path / "later.pt")]) == 2
    assert "a checkpoint of another version of this program" in capsys.readouterr().err
    torch.save(foreign | {"ema": 0.9, "classes": 7, "normalize": True}, tmp_path / "w.pt")
    words = ["evaluate", str(tmp_path / "w.pt"), "--attacks", "natural", "--subset", "20"]
    assert cli.main([*words, "--recipe", "digits.mwpb_at"]) == 0
    assert "weights from state_dict" in capsys.readouterr().out
