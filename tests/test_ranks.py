"""Several processes on one run: who has which images, what they tell each other, and that two train as one."""

from __future__ import annotations

import copy
import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_cases import apart, at_once, final, tiny, trained
from torch import nn

from mwpb_fast import cli
from mwpb_fast.attacks.pgd import PGD
from mwpb_fast.budgets._share import shared
from mwpb_fast.config import Config, ConfigError, DistributedConfig, PrecisionConfig, from_dict, recipe, to_dict
from mwpb_fast.data import DataError, ResidentLoader, load_split
from mwpb_fast.engine.build import named_training
from mwpb_fast.engine.net import untracked
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.engine.sync_norm import synchronise
from mwpb_fast.objectives._weighted import shared_out
from mwpb_fast.perturbations import awp
from mwpb_fast.runs import checkpoint, guards
from mwpb_fast.runs.together import whole_batch
from mwpb_fast.runs.writer import Writer
from mwpb_fast.step import Step
from mwpb_fast.system import ranks


@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_a_batch_are_the_one_process_batch_to_the_bit(count: int) -> None:
    config = dataclasses.replace(recipe("digits.at").data, batch_size=16, pad=1, subset=64)
    images = load_split(config, "train")
    index = torch.arange(70)
    whole = ResidentLoader(images, config, seed=3, train_index=index)
    parts = [ResidentLoader(images, config, seed=3, train_index=index, part=(k, count)) for k in range(count)]
    for one, *shares in zip(whole.epoch(2, 1), *(part.epoch(2, 1) for part in parts), strict=True):
        for name, value in one._asdict().items():
            assert torch.equal(value, torch.cat([getattr(share, name) for share in shares])), name


@pytest.mark.parametrize(("last", "reason"), [("drop", "a batch of 16 images"), ("keep", "data.last_batch drop")])
def test_a_batch_that_cannot_be_dealt_out_evenly_is_refused(last: Any, reason: str) -> None:
    count = 3 if last == "drop" else 4
    config = dataclasses.replace(recipe("digits.at").data, batch_size=16, last_batch=last)
    images = load_split(config, "train")
    with pytest.raises(DataError, match=reason):
        ResidentLoader(images, config, seed=0, train_index=torch.arange(70), part=(0, count))


def test_a_batch_for_each_process_is_a_larger_one_for_all_and_the_rule_of_its_rate_is_named() -> None:
    def rate(rule: Any) -> tuple[int, float]:
        config = dataclasses.replace(tiny("at"), distributed=DistributedConfig(per_rank=rule))
        found = whole_batch(config, 4)
        assert found.distributed.per_rank == "none"
        assert from_dict(to_dict(found)) == found
        return found.data.batch_size, found.optim.lr

    assert rate("none") == (16, 0.01)
    assert rate("constant") == (64, 0.01)
    assert rate("linear") == (64, 0.04)
    assert rate("sqrt") == (64, 0.02)
    with pytest.raises(ValueError, match="per_rank must be none"):
        rate("square")


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_what_several_processes_cannot_do_is_refused(
    second_of_two: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (ranks.launched(), ranks.number(), ranks.leads()) == (2, 1, False)
    assert ranks.place() == (0, 1)  # not joined yet
    assert cli.main(["recipes"]) == 2
    assert capsys.readouterr().err == (
        "mwpb-fast: rank 1: error: recipes is the work of one process: call mwpb-fast recipes without torchrun\n"
    )
    assert cli.main(["train", "digits.at", "--precision.compile=true", f"--out={tmp_path}"]) == 2
    assert "precision.compile" in capsys.readouterr().err
    assert cli.main(["train", "digits.at", "--precision.training=fused", f"--out={tmp_path}"]) == 2
    assert "precision.training: fused: not with several processes" in capsys.readouterr().err
    assert named_training(recipe("digits.at")) == "plain"  # not left to a trial
    monkeypatch.setattr(ranks, "_place", ranks.Place(1, 2))
    with pytest.raises(ConfigError, match="cuda:1 is one device for 2 processes: take cuda"):
        make_precision(PrecisionConfig(device="cuda:1"))
    assert not ranks.restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ranks.restarted()


def test_processes_that_do_not_come_together_are_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "1"}
    for name, value in (given | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "PATIENCE", ranks.datetime.timedelta(seconds=1))
    together = ranks.joined(False)
    with pytest.raises(ranks.RanksError, match="the 2 processes of this run do not come together"):
        together.__enter__()


# two processes ---------------------------------------------------------------------------------------------------
def network() -> nn.Sequential:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    return body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def told() -> None:
    """Everything that processes tell each other, in both of two, against the same done alone."""
    torch.manual_seed(0)
    x, y = torch.rand(8, 3, 6, 6), torch.randint(5, (8,))
    loss = nn.functional.cross_entropy
    with ranks.joined(False):
        rank = ranks.place().rank
        mine, labels = ranks.own(x), ranks.own(y)
        assert torch.equal(ranks.whole(mine), x)
        assert torch.equal(ranks.whole(labels > 2), y > 2)
        assert ranks.mean(torch.tensor(float(rank))) == 0.5
        assert ranks.most(rank, -rank) == (1, 0)
        assert ranks.agreed("no" if rank else "") == "rank 1: no"
        assert ranks.agreed("") == ""
        assert ranks.led(lambda: [rank, {"a": torch.ones(2)}, None])[0] == 0
        with pytest.raises(ranks.RanksError if rank else ZeroDivisionError):
            ranks.led(lambda: 1 // 0)
        with ranks.alone():
            assert ranks.count() == 1
            assert ranks.whole(mine) is mine
        # a value that differs in the last bit is found, and named
        values = {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.arange(3)}
        assert ranks.different(values) == ""
        values["c"][1] += rank
        assert ranks.different(values) == "rank 1 has other values than rank 0 in c"

        # batch statistics and their gradients are the whole batch's
        model, one = network(), network()
        synchronise(model)
        assert list(model.state_dict()) == list(one.state_dict())
        loss(model(mine), labels).backward()
        ranks.mean_([p.grad for p in model.parameters() if p.grad is not None])
        loss(one(x), y).backward()
        for ours, theirs in zip(model.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(model.buffers(), one.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
        before = copy.deepcopy(dict(model.named_buffers()))
        with untracked(model):
            torch.testing.assert_close(model(mine), ranks.own(one(x)), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
        assert torch.equal(copy.deepcopy(model).eval()(mine), model.eval()(mine))

        # what is computed from the whole batch: weights, radii, the direction of the perturbed weights
        score = torch.linspace(-3, 2, 8)
        with ranks.alone():
            expected = shared_out(score), shared(score.exp(), 0.1, "rescaled"), shared(score.exp(), 0.1, "equal")
        part = ranks.own(score)
        found = shared_out(part), shared(part.exp(), 0.1, "rescaled"), shared(part.exp(), 0.1, "equal")
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, ranks.own(want))
        perturb, model, one = awp.Config(gamma=0.5).build(), network().train(), network().train()
        synchronise(model)
        with (
            perturb(model, lambda: loss(model(mine), labels)),
            ranks.alone(),
            perturb(one, lambda: loss(one(x), y)),
        ):
            for ours, theirs in zip(model.parameters(), one.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

        # what an axis remembers of an image comes to every process
        method: Any = types.SimpleNamespace(memory={"attack": {"radius": torch.zeros(9)}})
        index = ranks.own(torch.tensor([8, 1, 3, 5]))
        method.memory["attack"]["radius"][index] = index.float()
        Step.exchange(None, index, method)  # type: ignore[arg-type]
        assert method.memory["attack"]["radius"].tolist() == [0, 1, 0, 3, 0, 5, 0, 0, 8]


def test_what_processes_tell_each_other() -> None:
    at_once(2, told)


def guarded(folder: Path) -> tuple[str, str, str, int]:
    """What each of two processes does where rank 0, which alone has records and states, finds a collapse."""
    place = folder if ranks.leads() else folder / "elsewhere"
    config = tiny("at", "--guard.action=roll_back", "--guard.rollbacks=1")
    with ranks.joined(False):
        watch = guards.Guards(config, place, Writer(place / "checkpoints", torch.device("cpu")), 4)
        with pytest.raises(guards.GuardError) as collapse:
            watch.epoch({"epoch": 3, "robust": 5.0, "fgsm": 80.0})
        path, state = watch.state_before(collapse.value, 0)
        with pytest.raises(guards.GuardError) as end:
            watch.state_before(collapse.value, state["rollbacks"])
    return str(collapse.value), str(end.value), path.name, state["epoch"]


def test_a_guard_sends_all_processes_back_to_the_state_of_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = {"epoch": 1, "robust": 40.0, "fgsm": 45.0}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(record)}\n", encoding="utf-8")
    for epoch in (2, 3):
        checkpoint.save(tmp_path / "checkpoints", "last", epoch, 0, {"epoch": epoch, "batch": 0})
    first, second = at_once(2, guarded, tmp_path)
    assert first == second
    assert first[0].startswith("epoch 3: catastrophic overfitting")
    assert "has gone back 1 times" in first[1]
    assert first[2:] == ("last-00002-0000000.pt", 2)
    assert capfd.readouterr().err.count("going back to last-00002-0000000.pt") == 1


def attacked_in_silence(config: Config, folder: Path) -> tuple[int, int]:
    """Train in this process's part; what was sent in the attacks, and besides."""
    sent, attack = [0, 0], PGD.__call__
    attacking = False

    def counted(function: Any) -> Any:
        def send(*arguments: Any, **more: Any) -> Any:
            sent[not attacking] += 1
            return function(*arguments, **more)

        return send

    def noted(*arguments: Any) -> Any:
        nonlocal attacking
        attacking = True
        try:
            return attack(*arguments)
        finally:
            attacking = False

    for name in ("all_reduce", "all_gather", "broadcast"):
        setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))
    PGD.__call__ = noted  # type: ignore[method-assign]
    trained(config, folder)
    return sent[0], sent[1]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same images with the same noise; weights but for the order in which sums are rounded. The attacks send
    nothing."""
    config: Config = tiny("at", "--data.subset=32", "--data.validation=0.01")
    trained(config, tmp_path / "one")
    for in_attacks, besides in at_once(2, attacked_in_silence, config, tmp_path / "two"):
        assert (in_attacks, besides > 0) == (0, True)
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-4
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    assert one["trace"].shape == two["trace"].shape
    torch.testing.assert_close(one["trace"], two["trace"], rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )
