"""Options as users write them: YAML's surprises, nulls, other scripts' digits, empty values, and `~`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mwpb_fast import cli
from mwpb_fast.config import ConfigError, recipe, to_dict, yaml_file
from mwpb_fast.config.radius import parse_radius
from mwpb_fast.options import configure, read_config


def given(folder: Path, text: str) -> Any:
    path = folder / "values.yaml"
    path.write_text(text, encoding="utf-8")
    return configure("table1.mwpb_at", {path: yaml_file.read(path)}, [])


REFUSED = {
    "optim:\n  lr: 0.3\nseed: 1\noptim:\n  momentum: 0.5\n": ", line 4: optim stands in line 1 already",
    "optim:\n  lr: 0.3\n  lr: 0.4\n": ", line 3: lr stands in line 2 already",
    "budget: {eps: yes}": "budget.eps: 'yes' is not a radius",
    "budget: {eps: true}": "budget.eps: true is not a radius",
    "budget: {eps: 1:30}": "budget.eps: '1:30' is not a radius",
    "epochs: 010": "epochs: 010 is not a whole number; write it without the leading zero",
    "epochs: 0o10": "epochs: 0o10 is not a whole number",
    "epochs: 0x10": "epochs: 0x10 is not a whole number",
    "epochs: 1_000": "epochs: 1_000 is not a whole number",
    "epochs: 1:30": "epochs: 1:30 is not a whole number",
    "epochs: 2001-01-01": "epochs: 2001-01-01 is not a whole number",
    "epochs: on": "epochs: on is not a whole number",
    "epochs: true": "epochs: true is not a whole number",
    "epochs: ٣": "epochs: ٣ is not a whole number",
    "seed: 99999999999999999999": "seed: 99999999999999999999 is too large",
    "optim: {lr: no}": "optim.lr: no is not a number",
    "optim: {lr: false}": "optim.lr: false is not a number",
    "optim: {drops: [8, yes]}": "optim.drops[1]: yes is not a whole number",
    "optim: {drops: [8, ~]}": "optim.drops[1] has no value",
    "optim: {lr: ~}": "optim.lr has no value",
    "optim: {lr: }": "optim.lr has no value",
    "optim: {momentum: null}": "optim.momentum has no value",
    "data: {batch_size: ~}": "data.batch_size has no value",
    "data: {subset: true}": "data.subset: true is not a value of this option",
    "data: {flip: 1}": "data.flip: 1 is not true or false",
    "precision: {device: ~}": "precision.device has no value",
    "model: {name: ~}": "model.name has no value",
    "model: {name: 010}": "model.name: model name '010' is not of the form",
    "model: {name: true}": "model.name: true is not text; write it in quotes",
    "attack: {start: ~}": "attack.start has no value",
    "budget: ~": "budget has no value",
    "budget: {name: ~}": "budget.name has no value",
    "objective: {name: mart, beta: yes}": "objective.beta: yes is not a number",
    "evaluation: {attacks: [natural, no]}": "no attack 'no'",
    "seed: !mine 3": ", line 1: could not determine a constructor for the tag '!mine'",
    "? [1]\n: 2": ", line 1: found unhashable key",
}


@pytest.mark.parametrize("text", REFUSED)
def test_yaml_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        given(tmp_path, text)
    assert REFUSED[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_swapped_module_is_the_one_that_judges(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no option 'budget.alpha'; did you mean budget.eps\?$"):
        given(tmp_path, "budget: {name: fixed, alpha: 1}")
    assert given(tmp_path, "objective: {name: mart, beta: 7}\nbudget: fixed").objective.beta == 7


def test_yaml_as_its_writer_means_it(tmp_path: Path) -> None:
    config = given(
        tmp_path,
        "data: {dir: 2001-01-01, flip: off, subset: ~}\noptim: {lr: 1e-3, ema: .5, drops: []}\nseed: +3\n"
        "precision: {device: 'cpu', tune: No}\nbudget: {eps: 0.03}\n",
    )
    assert (config.data.dir, config.data.flip, config.data.subset) == ("2001-01-01", False, None)
    assert (config.optim.lr, config.optim.ema, config.optim.drops, config.seed) == (0.001, 0.5, (), 3)
    assert config.budget.eps == parse_radius("0.03")


@pytest.mark.parametrize(
    "text", ["1e3", "010", "yes", "null", "~", "1:30", "2001-01-01", "größe", "a\udcffb", "7"]
)
def test_text_survives_the_saved_configuration(text: str, tmp_path: Path) -> None:
    """In this reader and, but for what is no text in any encoding, in those of YAML 1.1."""
    values = to_dict(recipe("digits.at"))
    values["data"]["dir"] = text
    (tmp_path / "config.yaml").write_bytes(yaml_file.write(values))
    assert read_config(tmp_path / "config.yaml").data.dir == text
    assert yaml.safe_load((tmp_path / "config.yaml").read_bytes())["data"]["dir"] == text


def test_configuration_edited_by_hand_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    for old, new, message in (
        ("lr: 0.05", "lr: fast", "optim.lr: fast is not a number"),
        ("seed: 0", "seed: 0\nseed: 1", "seed stands in line"),
        ("steps: 10", "step: 10", "no option 'attack.step'; did you mean attack.steps?"),
    ):
        text = yaml_file.write(to_dict(recipe("digits.at"))).decode()
        assert old in text
        path.write_text(text.replace(old, new))
        for words in (["evaluate", str(tmp_path)], ["train", "--config", str(path), "--out", str(tmp_path / "x")]):
            assert cli.main(words) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"mwpb-fast: error: {path}")
            assert message in err
            assert err.count("\n") == 1


WORDS = {
    "--epochs=010": "epochs: 010 is not a whole number",
    "--epochs=٣": "epochs: ٣ is not a whole number",
    "--epochs=1_0": "epochs: 1_0 is not a whole number",
    "--epochs=1:30": "epochs: 1:30 is not a whole number",
    "--epochs=": "epochs has no value",
    "--optim.lr=1e400": "optim.lr: 1e400 is too large",
    "--optim.lr=inf": "optim.lr: inf is not a number",
    "--optim.drops=": "optim.drops has no value; write [] for an empty list",
    "--optim.drops=8,,9": "optim.drops: 8,,9 is not a list",
    "--optim.drops=010": "optim.drops: 010 is not a whole number",
    "--data.dir=": "data.dir has no value",
    "--data.threads=1000000000": "threads is 1000000000; must be at most 1024",
    "--data.threads=-1": "threads is -1; must be at least 0",
    "--precision.device=": "precision.device has no value",
    "--data.batch_size=99999999999999999999": "data.batch_size: 99999999999999999999 is too large",
    "--evaluation.attacks=no": "no attack 'no'",
    "--data={}": "data: {} is not a group of options",
}


@pytest.mark.parametrize("word", WORDS)
def test_words_are_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure("table1.mwpb_at", {}, [word])
    assert WORDS[word] in str(caught.value)


@pytest.mark.parametrize("text", ["٣/٢٥٥", True, "1e-999999999", "1e999999999", "8/255e99999"])
def test_no_radius_and_no_waiting_for_it(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a radius"):
        parse_radius(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train digits.at --out=", "argument --out: is empty"),
        ("train digits.at --config=", "argument --config: is empty"),
        ("evaluate . --subset ٣", "invalid int value: '٣'"),
        ("evaluate . --subset 99999999999999999999", "invalid int value"),
        ("data prepare digits --dir=", "argument --dir: is empty"),
    ],
)
def test_commands_own_words(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_home_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configure("table1.at", {}, ["--data.dir=~/sets"]).data.dir == str(tmp_path / "sets")
    assert given(tmp_path, "data: {dir: ~/sets}").data.dir == str(tmp_path / "sets")
    (tmp_path / "v.yaml").write_text("epochs: 0\n")
    words = ["train", "digits.at", "--config", "~/v.yaml", "--out=~/run", "--no-evaluate", "--quiet"]
    assert cli.main(words) == 0
    assert (tmp_path / "run" / "config.yaml").exists()
    assert cli.main(["evaluate", "~/run", "--attacks", "natural", "--subset", "5"]) == 0
    assert cli.main(["evaluate", "~/absent"]) == 2
    assert f"{tmp_path}/absent: does not exist" in capsys.readouterr().err


def test_files_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    """A locale of ASCII, without Python's own coercion to UTF-8."""
    (tmp_path / "v.yaml").write_bytes("\ufeff# größer\ndata: {dir: größe}\n".encode())
    script = (
        "import sys; from pathlib import Path; from mwpb_fast.options import configure, read_yaml;"
        "p = Path(sys.argv[1]); c = configure('digits.at', {p: read_yaml(p)}, []);"
        "sys.exit(c.data.dir != 'gr\\u00f6\\u00dfe')"
    )
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "v.yaml")], env=environment)
    assert done.returncode == 0
