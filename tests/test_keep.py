"""Which checkpoints a run keeps: how many, in which form, and what serves for a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_train import assert_same, final_state, tiny

from mwpb_fast import cli, train
from mwpb_fast.runs import checkpoint

SMALL = ("--data.subset=128", "--warmup_epochs=0")


def test_so_many_states_and_best_ones_are_kept_with_their_weights(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    config = tiny("--epochs=5", *SMALL, "--keep.last=3", "--keep.best=2")
    train.run(config, tmp_path, quiet=True)
    folder = tmp_path / "checkpoints"
    assert [path.name[:10] for path in checkpoint.existing(folder, "last")] == [f"last-0000{n}" for n in (6, 5, 4)]
    best = checkpoint.existing(folder, "best")
    assert 1 <= len(best) <= 2
    assert {path.name for path in folder.glob("*.safetensors")} == {f"{path.stem}.safetensors" for path in best}
    state = checkpoint.read(best[0])
    assert_same(load_file(checkpoint.weights_of(best[0])), dict(state["model"]))
    with safe_open(checkpoint.weights_of(best[0]), framework="pt") as file:
        assert file.metadata()["epoch"] == str(state["epoch"])
        assert file.metadata()["classes"].startswith('["0"')
    path = str(checkpoint.weights_of(best[0]))
    words = ["--recipe=digits.mwpb_at", "--model.name=smallresnet-8", "--attacks=natural", "--subset=20"]
    assert cli.main(["evaluate", path, *words]) == 0
    train.run(tiny("--epochs=6", *SMALL, "--keep.safetensors=false"), tmp_path, quiet=True)
    assert len(checkpoint.existing(folder, "last")) == 2
    assert len(checkpoint.existing(folder, "best")) <= 2


def test_a_state_within_an_epoch_is_gone_on_from_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """Each look at it is two seconds after the one before."""

        now = 0.0

        def monotonic(self) -> float:
            self.now += 2.0
            return self.now

    config = tiny("--epochs=2", *SMALL)
    train.run(config, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(train, "time", Clock())
    trainer = train.Trainer(tiny("--epochs=2", *SMALL, "--keep.minutes=1e-9"), tmp_path / "cut", None, quiet=True)  # type: ignore[arg-type]
    trainer.request = type("Request", (), {"number": 0})()  # type: ignore[assignment]

    def killed() -> None:
        trainer.writer.wait()
        raise ZeroDivisionError

    monkeypatch.setattr(trainer, "validate", killed)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    found = final_state(tmp_path / "cut")
    assert found["epoch"] == 1
    assert found["batch"] > 0
    assert found["seconds"] > 0
    monkeypatch.undo()
    train.run(config, tmp_path / "cut", quiet=True)
    times = ("seconds", "waited", "config")
    one, other = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    assert_same(
        {k: v for k, v in one.items() if k not in times}, {k: v for k, v in other.items() if k not in times}
    )


def test_a_damaged_newest_state_is_named_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(tiny("--epochs=3", *SMALL), tmp_path / "whole", quiet=True)
    train.run(tiny("--epochs=2", *SMALL), tmp_path / "hurt", quiet=True)
    path = checkpoint.existing(tmp_path / "hurt" / "checkpoints", "last")[0]
    path.write_bytes(path.read_bytes()[:-1])
    train.run(tiny("--epochs=3", *SMALL), tmp_path / "hurt", quiet=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: damaged" in line
    assert line.endswith("last-00002-0000000.pt is taken in its place")
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "hurt"))


@pytest.mark.parametrize(
    "word",
    [
        *(f"--keep.{word}" for word in ("last=0", "best=0", "minutes=-1", "minutes=inf")),
        *(f"--guard.{word}" for word in ("action=explode", "rate=0", "loss_steps=0", "hang=-1", "collapse=101")),
        *(f"--guard.{word}" for word in ("rollbacks=-1", "loss=nan")),
    ],
)
def test_absurd_values_are_refused(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "digits.mwpb_at", word, f"--out={tmp_path / 'x'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
