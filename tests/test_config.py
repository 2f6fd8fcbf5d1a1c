"""Configuration: what overrides what, what is refused, and with which words."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mwpb_fast.cli.parser import split
from mwpb_fast.config import (
    Config,
    ConfigError,
    OptimConfig,
    PrecisionConfig,
    axis_name,
    from_dict,
    load,
    recipe,
    to_dict,
)
from mwpb_fast.config.radius import parse_radius
from mwpb_fast.config.schema import ADDED
from mwpb_fast.data.dataset import DataError
from mwpb_fast.options import configure, explain, read_yaml

START = recipe("table1.mwpb_at")


def given_files(tmp_path: Path, text: str) -> dict[Path, dict]:
    path = tmp_path / "values.yaml"
    path.write_text(text)
    return {path: read_yaml(path)}


# what overrides what --------------------------------------------------------------------------------------------
def test_recipe_then_yaml_then_command_line(tmp_path: Path) -> None:
    files = given_files(tmp_path, "epochs: 7\nseed: 3\noptim: {lr: 0.02}\n")
    config = configure("table1.mwpb_at", files, ["--seed=4"])
    assert (config.epochs, config.seed, config.optim.lr) == (7, 4, 0.02)
    assert config.optim.weight_decay == START.optim.weight_decay
    assert dataclasses.replace(config, epochs=110, seed=0, optim=START.optim) == START


def test_later_file_and_later_option_win() -> None:
    files = {Path("a"): {"epochs": 5, "seed": 1}, Path("b"): {"epochs": 6}}
    config = configure("table1.mwpb_at", files, ["--data.pad=2", "--data.pad=3"])
    assert (config.epochs, config.seed, config.data.pad) == (6, 1, 3)


@pytest.mark.parametrize("order", [0, 1])
def test_axis_is_changed_by_name_and_keeps_eps(order: int) -> None:
    words = ["--budget=fixed", "--budget.eps=6/255"]
    swapped = configure("table1.mwpb_at", {}, ["--budget.eps=6/255", "--budget=fixed"][:: 1 - 2 * order])
    assert swapped.budget == load("budgets", "fixed").Config(eps=Fraction(6, 255))
    assert configure("digits.mwpb_at", {}, words[:1]).budget.eps == Fraction(32, 255)


def test_axis_in_yaml_as_name_or_group(tmp_path: Path) -> None:
    short = configure("table1.mwpb_at", given_files(tmp_path, "objective: mart\n"), ["--objective.beta=7"])
    whole = configure("table1.mwpb_at", given_files(tmp_path, "objective: {name: mart, beta: 7}\n"), [])
    assert short == whole
    assert whole.objective == load("objectives", "mart").Config(beta=7.0)


def test_same_axis_by_name_keeps_its_values() -> None:
    config = configure("table2.mwpb_mart", {}, ["--objective=mart", "--budget=margin"])
    assert (config.objective.beta, config.budget.alpha) == (6.0, 0.55)


def test_axis_from_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from mwpb_fast.objectives import at\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Config(at.Config):\n"
        '    """depth: how deep."""\n'
        "    depth: int = 3\n"
    )
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine_for_test.py").write_bytes((tmp_path / "mine_for_test.py").read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    config = configure("table1.at", {}, ["--objective=outside.mine_for_test", "--objective.depth=5"])
    assert config.objective.depth == 5
    assert axis_name("objectives", config.objective) == "outside.mine_for_test"
    assert from_dict(to_dict(config)) == config


def test_fractions_stay_exact() -> None:
    words = ["--budget.eps=8/255", "--evaluation.eps=0.031", "--attack.step_size=1/255"]
    config = configure("table1.mwpb_at", {}, words)
    assert to_dict(config)["budget"]["eps"] == "8/255"
    assert config.evaluation.eps == Fraction(31, 1000)
    assert config.attack.step_size == Fraction(1, 255)
    assert from_dict(to_dict(config)) == config


def test_lists_need_no_brackets() -> None:
    config = configure("table1.mwpb_at", {}, ["--optim.drops=8,9", "--evaluation.attacks=natural,pgd20"])
    assert config.optim.drops == (8, 9)
    assert config.evaluation.attacks == ("natural", "pgd20")
    assert configure("table1.mwpb_at", {}, ["--optim.drops=[8]"]).optim.drops == (8,)
    assert configure("table1.mwpb_at", {}, ["--optim.drops=7"]).optim.drops == (7,)


def test_split_tells_options_from_overrides() -> None:
    words = ["table1.at", "--out", "x", "--epochs", "3", "--budget.eps=8/255", "--optim.lr", "-1", "--quiet"]
    own, overrides = split(words, ["--out", "--quiet"])
    assert own == ["table1.at", "--out", "x", "--quiet"]
    assert overrides == ["--epochs=3", "--budget.eps=8/255", "--optim.lr=-1"]


# what is refused ------------------------------------------------------------------------------------------------
REFUSED = {
    "--epochs=x": "epochs: x is not a whole number",
    "--epochs=2.5": "epochs: 2.5 is not a whole number",
    "--epochs=-1": "must not be negative",
    "--epoch=3": "no option 'epoch'; did you mean epochs?",
    "--recipe=table2.at": "no option 'recipe'",
    "--nope=3": "no option 'nope'; there are data,",
    "--nope": "no option 'nope'",
    "--budget.eps=8/0": "budget.eps: '8/0' is not a radius: write 8/255 or 0.031",
    "--budget.eps=-8/255": "must lie in [0, 1000]",
    "--budget.ep=8/255": "no option 'budget.ep'; did you mean budget.eps?",
    "--budget.eps=8": "budget.eps is 8, but images lie in [0, 1]: did you mean 8/255?",
    "--warmup.eps=4": "warmup.eps is 4, but images lie in [0, 1]: did you mean 4/255?",
    "--attack.step_size=3/2": "attack.step_size is 3/2, but images lie in [0, 1]: did you mean 8/255?",
    "--evaluation.eps=8": "eps is 8, but images lie in [0, 1]: did you mean 8/255?",
    "--evaluation.step_size=2": "step_size is 2, but images lie in [0, 1]: did you mean 2/255?",
    "--budget.alpha=9": "alpha must lie in [0, 5], not 9.0",
    "--budget.alpha=nan": "budget.alpha: nan is not a number",
    "--budget=nope": "no 'nope' among the budgets: deviation, fixed, margin",
    "--attack=inner": "no 'inner' among the attacks: adaptive, anpgd, pgd, squeeze",
    "--attack=.pgd": "no '.pgd' among the attacks: adaptive, anpgd, pgd, squeeze",
    "--objective.beta=6": "no option 'objective.beta'; objective at has no options",
    "--data.loader=fast": "data.loader: fast is not one of auto, resident, dali",
    "--data.subset=x": "data.subset: x is not a value of this option",
    "--data.flip=maybe": "data.flip: maybe is not true or false",
    "--data.name=tabular": "'tabular' is not a known data set; there are cifar10,",
    "--data=x": "data: x is not a group of options",
    "--model.name=foo-3": "model.name: unknown model 'foo-3'; available: preactresnet, resnet,",
    "--model.name=a b": "model.name: model name 'a b' is not of the form",
    "--optim.drops=[3,1]": "drops must be rising epochs",
    "--optim.drops=[x]": "optim.drops: x is not a whole number",
    "--optim.lr=-1": "lr must be positive",
    "--optim.fused=best": "fused must be torch or apex",
    "--precision.dtype=fp8": "dtype must be auto, fp32, bf16 or fp16",
    "--evaluation.attacks=pgd20,foo": "no attack 'foo'; there are natural, fgsm, aa, aa-l2,",
    "--evaluation.batch_size=0": "batch_size and validate_every must be at least 1",
}


@pytest.mark.parametrize("word", REFUSED)
def test_command_line_is_refused_in_one_line(word: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        configure("table1.mwpb_at", {}, [word])
    message = str(caught.value)
    assert REFUSED[word] in message
    assert "\n" not in message
    assert "Parser key" not in message
    assert "class '" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope: 1\n", "no option 'nope'"),
        ("budget: {nope: 1}\n", "no option 'budget.nope'"),
        ("budget: {name: nope}\n", "no 'nope' among the budgets"),
        ("budget: {name: [1]}\n", "among the budgets"),
        ("budget: {eps: x}\n", "budget.eps: 'x' is not a radius"),
        ("epochs:\n", "epochs has no value"),
        ("data: 3\n", "data: 3 is not a group of options"),
        ("3: 4\n", "3"),
        ("optim: {lr: fast}\n", "optim.lr: fast is not a number"),
        ("optim: {lr: .nan}\n", "lr must be positive and finite"),
        ("objective: {name: mart, beta: .inf}\n", "objective.beta: inf is not a finite number"),
        ("- 1\n", "holds no options"),
        ("", "holds no options"),
        ("a: [1\n", "not YAML"),
        ("a: \x07\n", "not YAML"),
    ],
)
def test_yaml_is_refused_with_the_files_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure("table1.mwpb_at", given_files(tmp_path, text), [])
    assert message in str(caught.value)
    assert str(tmp_path / "values.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        read_yaml(tmp_path / "binary.yaml")


def test_a_recipe_has_one_name_however_it_is_spelt() -> None:
    assert configure("table1.mwpb-at", {}, []) == configure("table1.mwpb_at", {}, [])
    assert configure("fair-digits.mwpb", {}, []).recipe == "fair_digits.mwpb"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tabel1.mwpb_at", "did you mean table1.mwpb_at"),
        ("table1.mpwb_at", "did you mean table1.mwpb_at"),
        ("table1", "table1 has table1.at"),
        ("nothing_like_it", "among the recipes: ablation"),
        ("table1.SETTING", "no recipe"),
        ("table1.Setting", "no recipe"),
        ("table1.__doc__", "is not a recipe's name"),
        ("_paper.Setting", "is not a recipe's name"),
        ("os.getcwd", "no 'os'"),
        (".at", "is not a recipe's name"),
        ("", "is not a recipe's name"),
    ],
)
def test_unknown_recipe(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(name, {}, [])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted({field.name for field in dataclasses.fields(Config)} - ADDED))
def test_saved_configuration_must_be_whole(key: str) -> None:
    values = to_dict(START)
    del values[key]
    with pytest.raises(ConfigError, match=key):
        from_dict(values)


def test_saved_configuration_with_something_foreign() -> None:
    for change in ({"x": 1}, {"budget": 3}, {"budget": {"name": "nope"}}, {"optim": {"x": 1}}):
        with pytest.raises(ConfigError):
            from_dict({**to_dict(START), **change})


def test_values_checked_by_the_classes() -> None:
    for bad in ({"momentum": 1.0}, {"weight_decay": -1.0}, {"ema": 1.0}, {"drops": (0,)}, {"lr": math.nan}):
        with pytest.raises(ValueError, match="must be"):
            OptimConfig(**bad)
    with pytest.raises(ValueError, match="oracle"):
        PrecisionConfig(oracle=True, dtype="bf16")
    assert dataclasses.replace(START, attack_mode="batch").attack_mode == "batch"
    with pytest.raises(ValueError, match="attack_mode"):
        dataclasses.replace(START, attack_mode="frozen")


def test_explain_leaves_the_unknown_alone() -> None:
    assert explain("something else", START) == "something else"


# radii ----------------------------------------------------------------------------------------------------------
@given(st.fractions(min_value=0, max_value=1000))
def test_radius_round_trips(value: Fraction) -> None:
    assert parse_radius(str(value)) == value


@given(st.floats(min_value=0, max_value=1000))
def test_radius_of_a_float_is_what_is_written(value: float) -> None:
    assert parse_radius(value) == Fraction(str(value))
    assert float(parse_radius(value)) == value


@pytest.mark.parametrize("text", ["", "8/0", "8//255", "-1", "1001", "nan", "inf", "eight", "8/255/2", "0x8"])
def test_not_a_radius(text: str) -> None:
    with pytest.raises(ValueError, match="is not a radius"):
        parse_radius(text)
