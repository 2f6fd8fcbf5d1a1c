"""A state is bound to its data: prepared sets are not overwritten in silence, runs and evaluations know theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_sets import folder_files, picture, write

from mwpb_fast import cli, data
from mwpb_fast.config import EvaluationConfig
from mwpb_fast.data import Config, DataError, find_set, load_split, prepare
from mwpb_fast.evaluation.checkpoint import evaluate_run
from mwpb_fast.evaluation.request import Request
from mwpb_fast.runs import checkpoint
from mwpb_fast.runs.checkpoint import read_newest

# each as the first but for one thing: another picture, another class's name, one image more, another size
SETS = {
    "cats": folder_files(),
    "pixels": {**folder_files(), "top/train/bee/0.png": picture(99)},
    "names": {name.replace("/cat/", "/cow/"): content for name, content in folder_files().items()},
    "more": {**folder_files(), "top/train/bee/9.png": picture(99)},
    "size": {name: picture(i, size=(9, 8)) for i, name in enumerate(folder_files())},
    "four": folder_files() | {f"top/{split}/dog/0.png": picture(98) for split in ("train", "test")},
}
OTHER = {
    "pixels": "other images or labels",
    "names": "class 2 is cat, here cow",
    "more": "9 images, here 10",
    "size": "6x5 pixels, here 9x8",
    "four": "3 classes, here 4",
}


def put(tmp_path: Path, kind: str, **options: Any) -> dict[str, Any]:
    source = write(tmp_path / kind, SETS[kind])
    return prepare("folder", source=source, dir=tmp_path / "data", replace=True, **options)


def train(tmp_path: Path, *words: str) -> int:
    return cli.main(
        ["train", "digits.mwpb_at", "--data.name=folder", f"--data.dir={tmp_path / 'data'}", "--data.batch_size=4",
         "--data.validation=0", "--data.pad=1", "--warmup_epochs=0", "--model.name=smallresnet-8",
         "--attack.steps=1", "--no-evaluate", "--quiet", f"--out={tmp_path / 'run'}", *words]
    )  # fmt: skip


def rewrite(tmp_path: Path, kind: str, change: Any) -> None:
    """Change the state of the run's newest checkpoint of a kind."""
    folder = tmp_path / "run" / "checkpoints"
    path, state = read_newest(folder, kind) or pytest.fail("no checkpoint")
    change(state)
    checkpoint.save(folder, kind, *(int(part) for part in path.stem.split("-")[1:]), state)


# a run and its data ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bound")
    put(path, "cats")
    assert train(path, "--epochs=1") == 0
    return path


@pytest.mark.parametrize("kind", OTHER)
def test_a_run_does_not_go_on_with_other_data(
    kind: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(trained, kind)
    before = {path: path.read_bytes() for path in (trained / "run").rglob("*.pt")}
    capsys.readouterr()
    assert train(trained, "--epochs=2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a run on other data" in line
    assert OTHER[kind] in line
    assert before == {path: path.read_bytes() for path in (trained / "run").rglob("*.pt")}


@pytest.mark.parametrize("kind", ["names", "size", "four"])
def test_a_checkpoint_is_not_evaluated_on_data_of_another_kind(
    kind: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(trained, kind)
    capsys.readouterr()
    words = ["evaluate", str(trained / "run"), "--data-dir", str(trained / "data"), "--attacks", "natural"]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"not the data of the checkpoint, which has {OTHER[kind]}" in line


def test_flags_of_other_test_images_are_not_taken(trained: Path) -> None:
    put(trained, "cats")
    state = (read_newest(trained / "run" / "checkpoints", "best") or pytest.fail("none"))[1]
    assert state["data"]["sha256"] == load_split(Config(name="folder", dir=str(trained / "data")), "train").sha256
    natural, results = EvaluationConfig(attacks=("natural", "fgsm")), []
    for change in ({}, {"top/test/bee/0.png": picture(97)}):
        source = write(trained / f"test{len(change)}", {**SETS["cats"], **change})
        prepare("folder", source=source, dir=trained / "data", replace=True)
        results.append(evaluate_run(Request(trained / "run", natural, data_dir=trained / "data", show=False)))
    first, second = results
    assert first["split_sha256"] != second["split_sha256"]
    assert first["data_sha256"] != second["data_sha256"]
    test = load_split(Config(name="folder", dir=str(trained / "data")), "test")
    assert second["split_sha256"] == test.sha256
    names = [path.name for path in (trained / "run" / "evaluation-best").iterdir()]
    assert len(names) == 2 * len(first["attacks"])  # each image's flags under a key of their own


def test_the_same_data_anywhere_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "cats")
    assert train(tmp_path, "--epochs=1") == 0
    meta = tmp_path / "data" / "folder" / "meta.json"
    older = json.loads(meta.read_text())
    del older["sha256"]  # as an older version wrote it
    for split in older["splits"].values():
        del split["content"]  # the hash is then computed
    meta.write_text(json.dumps(older))
    assert train(tmp_path, "--epochs=2") == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    assert train(tmp_path, "--epochs=3", f"--data.dir={tmp_path / 'moved'}") == 0


def test_a_checkpoint_of_an_older_version_compares_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "cats")
    assert train(tmp_path, "--epochs=1") == 0
    rewrite(tmp_path, "last", lambda state: state.pop("data"))
    put(tmp_path, "names")
    assert train(tmp_path, "--epochs=2") == 2
    assert OTHER["names"] in capsys.readouterr().err
    put(tmp_path, "pixels")
    assert train(tmp_path, "--epochs=2") == 0  # it cannot know


def test_what_another_programs_file_holds_is_no_identity() -> None:
    for state in ({}, {"classes": 10}, {"data": "cifar10"}, {"data": torch.zeros(3)}, {"channels": 3}):
        assert data.identity_of(state) == {}
    assert data.identity_of({"classes": ["a", "b"], "channels": 3}) == {"classes": ["a", "b"], "channels": 3}


def test_the_embedded_set_has_a_hash() -> None:
    one, other = (load_split(Config(name="digits"), split) for split in ("train", "test"))
    assert one.sha256 == load_split(Config(name="digits"), "train").sha256 != other.sha256
    assert data.identity(one) | {"sha256": ""} == {
        "sha256": "",
        "count": 1438,
        "channels": 1,
        "height": 8,
        "width": 8,
        "classes": [str(digit) for digit in range(10)],
    }


def test_the_hash_is_of_images_and_labels(tmp_path: Path) -> None:
    put(tmp_path, "cats")
    images = load_split(Config(name="folder", dir=str(tmp_path / "data")), "train")
    assert images.content == images.sha256
    again = data.Images(images.images.contiguous(), images.labels, images.classes)
    assert again.sha256 == images.sha256
    swapped = data.Images(images.images, images.labels.flip(0), images.classes)
    assert swapped.sha256 != images.sha256


# sets that are there already ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", OTHER)
def test_a_set_is_not_overwritten_without_a_word(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "cats")
    place = tmp_path / "data" / "folder"
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    words = ["data", "prepare", "folder", "--dir", str(tmp_path / "data"), "--from"]
    other = str(write(tmp_path / kind, SETS[kind]))
    assert cli.main([*words, other]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert OTHER[kind] in line
    assert "--replace" in line
    assert "folder:NAME" in line
    assert before == {path.name: path.read_bytes() for path in place.iterdir()}
    assert cli.main([*words, str(tmp_path / "cats")]) == 0
    assert "the same images are there already" in capsys.readouterr().err
    assert cli.main([*words, other, "--replace"]) == 0
    assert before != {path.name: path.read_bytes() for path in place.iterdir()}


def test_image_files_are_added_to_the_same_set_and_leave_with_another(tmp_path: Path) -> None:
    put(tmp_path, "cats")
    source, place = tmp_path / "cats", tmp_path / "data" / "folder"
    assert "encoded" in prepare("folder", source=source, dir=tmp_path / "data", encoded=True)["splits"]["train"]
    assert (place / "train.encoded.safetensors").exists()
    assert "encoded" in prepare("folder", source=source, dir=tmp_path / "data")["splits"]["train"]
    put(tmp_path, "more")
    assert sorted(path.name for path in place.iterdir()) == ["meta.json", "test.safetensors", "train.safetensors"]


def test_a_damaged_set_is_replaced_when_asked(tmp_path: Path) -> None:
    put(tmp_path, "cats")
    (tmp_path / "data" / "folder" / "test.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"damaged .*--replace"):
        prepare("folder", source=tmp_path / "cats", dir=tmp_path / "data")
    put(tmp_path, "cats")
    assert len(load_split(Config(name="folder", dir=str(tmp_path / "data")), "test")) == 9


def test_sets_of_one_kind_have_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("cats", "four"):
        prepare(f"folder:{kind}", source=write(tmp_path / kind, SETS[kind]), dir=tmp_path)
    prepare("folder", source=tmp_path / "cats", dir=tmp_path)
    assert load_split(Config(name="folder:four", dir=str(tmp_path)), "train").num_classes == 4
    assert load_split(Config(name="folder:cats", dir=str(tmp_path)), "train").num_classes == 3
    assert (tmp_path / "folder-cats" / "meta.json").is_file()
    assert cli.main(["data", "list", "--dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines if line.startswith("folder")] == [
        ["folder", "9", "+", "9"],
        ["folder:cats", "9", "+", "9"],
        ["folder:four", "10", "+", "10"],
    ]
    (tmp_path / "folder-cats").rename(tmp_path / "folder-dogs")
    with pytest.raises(DataError, match="is of folder:cats, not folder:dogs"):
        load_split(Config(name="folder:dogs", dir=str(tmp_path)), "train")
    for name in ("folder:", "folder:a/b", "folder:..", "folder: x", "digits:mine", "nope:x"):
        with pytest.raises(DataError):
            find_set(name)


def test_a_set_of_one_class_that_is_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "cats")
    meta = tmp_path / "data" / "folder" / "meta.json"
    older = json.loads(meta.read_text())
    del older["sha256"]
    meta.write_text(json.dumps(older | {"classes": ["cat"]}))
    assert train(tmp_path, "--epochs=1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has one class, cat" in line
