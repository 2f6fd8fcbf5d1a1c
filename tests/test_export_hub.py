"""export --push-to-hub: file and card in one commit, on a hub of this machine; the token is told to nobody."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, serving
from test_export import made

from mwpb_fast import cli
from mwpb_fast.export.source import read_source

TOKEN = "a-secret-of-this-test"
NEEDED = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None,
    reason="not installed: huggingface_hub (the extra `hub`)",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as hub:
        hub.token = TOKEN
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        # read once from the environment, at the import; hf_xet speaks to servers of its own
        constants = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
        yield hub


def push(folder: Path, *words: str, name: str = "lab/digits") -> int:
    return cli.main(["export", str(folder), "--push-to-hub", name, *words])


@NEEDED
@pytest.mark.parametrize("word", ["", "--private", "--public"])
def test_file_and_card_are_one_commit(
    word: str, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "run", "smallresnet-4", size=8)
    entry = {"accuracy": 51.25, "interval": [50.0, 52.5], "norm": "linf", "eps": "8/255"}
    result = {"sha256": read_source(tmp_path / "run", "best").sha256, "n": 10000, "preview": False}
    verdict = {"check": "more steps", "verdict": "ok", "text": "no stronger"}
    for kind, more in (("evaluation", {"attacks": {"aa": entry}}), ("trust", {"verdicts": [verdict]})):
        (tmp_path / "run" / f"{kind}-best.json").write_text(json.dumps(result | more))
    assert push(tmp_path / "run", *filter(None, [word])) == 0
    assert hub.private == {"lab/digits": word != "--public"}
    folder = tmp_path / "run" / "export-safetensors"
    assert hub.repositories["lab/digits"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum("/commit/" in call for call in hub.calls) == 1
    card = hub.repositories["lab/digits"]["README.md"].decode()
    for text in ("table1.mwpb_at", "51.25 %", "ok: more steps", "hf download lab/digits", "tags: [adversarial"):
        assert text in card
    out, err = capfd.readouterr()
    assert f"pushed: {hub.address}/lab/digits/commit/" in out
    everything = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert TOKEN not in out + err
    assert not any(TOKEN.encode() in content for content in everything)
    # the same again changes what is there, and leaves it as private as it is
    assert push(tmp_path / "run") == 0
    assert hub.private == {"lab/digits": word != "--public"}


@NEEDED
def test_a_repository_of_the_other_kind_and_somebodys_card_are_left_alone(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "smallresnet-4", size=8)
    hub.repositories["lab/digits"], hub.private["lab/digits"] = {"README.md": b"# Mine\n"}, False
    assert push(tmp_path, "--private") == 2
    assert "lab/digits: is there, and public" in capfd.readouterr().err
    assert push(tmp_path, "--public") == 2
    assert "its README.md is not of this command" in capfd.readouterr().err
    errors = importlib.import_module("huggingface_hub.errors")

    def unheard(*words: object, **options: object) -> str:
        raise errors.LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", unheard)
    assert push(tmp_path) == 1
    assert "not pushed: cannot reach the hub" in capfd.readouterr().err
    assert hub.repositories["lab/digits"] == {"README.md": b"# Mine\n"}


@NEEDED
def test_errors_are_one_line_without_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "smallresnet-4", size=8)
    hub.broken = "/commit/"  # and says what the token was
    assert push(tmp_path) == 1
    out, err = capfd.readouterr()
    assert err.startswith("mwpb-fast: error: lab/digits: not pushed: ")
    assert "Bearer ***" in err
    hub.token = "another"
    assert push(tmp_path) == 2
    refused = capfd.readouterr().err
    assert "HF_TOKEN, or `hf auth login`" in refused
    assert TOKEN not in out + err + refused
    assert (err + refused).count("\n") == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MWPB_DEBUG", "1")
        with pytest.raises(Exception, match="the hub refuses") as shown:
            push(tmp_path)
        assert TOKEN not in str(shown.getrepr(chain=True, style="native"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert push(tmp_path) == 1
    assert "not pushed: " in capfd.readouterr().err


def test_words_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "smallresnet-4", size=8)
    assert push(tmp_path, name="digits") == 2
    assert "takes ORG/NAME" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), "--private"]) == 2
    assert "go with --push-to-hub" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        assert push(tmp_path) == 2
    error = capsys.readouterr().err
    assert "--push-to-hub needs huggingface_hub, which is not installed: pip install 'mwpb-fast[hub]'" in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
