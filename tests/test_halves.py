"""An attack on both halves of a batch at the same time: the whole's values, and no race, on fake streams."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from capture_cases import AT, CPU, assert_same, assert_same_result, batch, capture, make_step, values
from choice_cases import MEMORY, begun, config, failing, graphs, record, refusals, tried
from fake_streams import Stream, Streams, streams
from method_cases import method
from test_capture import axes, fitting
from test_choice_variants import faster, offered
from twin_cases import CPU32

from mwpb_fast import train
from mwpb_fast.choice import candidates
from mwpb_fast.choice.ledger import Ledger
from mwpb_fast.config import ConfigError
from mwpb_fast.engine import build
from mwpb_fast.engine.halves import HalvesNet
from mwpb_fast.engine.twin import BY_HAND, PLAIN, TwinNet
from mwpb_fast.inner_losses import cross_entropy
from mwpb_fast.method import Batch
from mwpb_fast.step import Step

FIXTURES = (graphs, offered, streams, tried)


def halved(step: Step, variant: str = BY_HAND) -> HalvesNet:
    return HalvesNet(TwinNet(step.model, CPU, batch(0)[0].x, variant=variant), torch.device("cpu"))


# values and races ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "variant"), [*((name, BY_HAND) for name in axes("attacks")), ("pgd", PLAIN), ("squeeze", PLAIN)]
)
def test_every_attack_finds_the_wholes_images(streams: Streams, name: str, variant: str) -> None:
    """An odd batch; nothing of the attack's memory, notes and starts differs but by roundings."""
    step, size = make_step(), 7
    step.model.eval()
    configs = fitting("attacks", name)
    given, key = batch(1, size)
    found = []
    for net in (halved(step, variant), TwinNet(step.model, CPU, given.x, variant=variant)):
        attack = dataclasses.replace(configs["attacks"], steps=2).build()
        objective = configs["objectives"].build()
        attack.remember(400, torch.device("cpu"))
        notes: dict[str, torch.Tensor] = {}
        with streams:
            net.refresh()
            clean, radius = net.logits(given.x), torch.full((size,), 0.03)
            x_adv = attack.in_epoch(100)(net, given, clean, radius, objective.inner, key, notes)
        found.append(
            {"x_adv": x_adv, "clean": clean, **notes, **{f"memory {k}": v for k, v in attack.memory.items()}}
        )
    assert not streams.races
    assert found[0].keys() == found[1].keys()
    for what, value in found[0].items():
        torch.testing.assert_close(value, found[1][what], rtol=1e-4, atol=1e-5)


def test_both_streams_work_and_what_they_do_not_wait_for_is_told_of(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait that is left out is a race, so that the test above means something."""
    step = make_step()
    step.model.eval()
    net, (given, _) = halved(step), batch(0)
    waits, left_out = [0], [-1]
    wait = Stream.wait_stream

    def waits_or_not(self: Stream, other: Stream) -> None:
        waits[0] += 1
        if waits[0] != left_out[0]:
            wait(self, other)

    monkeypatch.setattr(Stream, "wait_stream", waits_or_not)

    def races() -> list[str]:
        waits[0], streams.races = 0, []
        with streams:
            x = given.x * 1  # on the main stream, as an attack's images are
            gradient = net.input_grad(x, lambda logits: cross_entropy(logits, None, given.y))
            del x
            gradient + 1
        for one, other in ((net.side, streams.current[0]), (streams.current[0], net.side)):
            wait(one, other)
        return streams.races

    assert races() == []
    assert net.side.done > 10
    assert waits[0] == 4
    for number in range(1, 5):
        left_out[0] = number
        assert races(), number


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:the attack runs in train mode")
def test_what_is_not_divided(streams: Streams, training: bool) -> None:
    """One image; and in train mode any batch, whose statistics are those of the whole."""
    step = make_step()
    net, twin = halved(step), TwinNet(step.model, CPU, batch(0)[0].x, variant=BY_HAND)
    step.model.train(training)
    given, _ = batch(0, 6 if training else 1)
    with streams:
        for one in (net, twin):
            gradient = one.input_grad(given.x, lambda logits: cross_entropy(logits, None, given.y))
            assert gradient.shape == given.x.shape
    assert net.side.done == 0
    assert torch.equal(net.logits(given.x), twin.logits(given.x))


def test_a_pass_that_fails_is_joined(streams: Streams) -> None:
    """So that a capture can be ended, and what follows is on the stream on which it was."""
    step = make_step()
    step.model.eval()
    net, (given, _) = halved(step), batch(0)
    with streams, pytest.raises(torch.OutOfMemoryError):
        net.input_grad(given.x, failing(MEMORY))
    (main,) = streams.current
    assert main.knows(net.side, net.side.done)


# captured -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
def test_a_replay_has_the_bits_of_the_eager_halves(streams: Streams, objective: str) -> None:
    eager, other = make_step(ema=0.9), make_step(ema=0.9)
    eager.net, other.net = halved(eager), halved(other)
    captured, asked = capture(other), method(objective)
    for number in range(3):
        assert_same_result(eager(*batch(number, 5), asked), captured(*batch(number, 5), asked))
        assert_same(values(eager), values(other))
    assert captured.captures == 1
    assert captured.verify(*batch(4, 5), asked) == []


def test_the_ledger_sees_both_halves(streams: Streams) -> None:
    step = make_step()
    ledger = Ledger(step.model, CPU32, batch(0)[0], 8 / 255, "eval")
    net = halved(step)
    assert ledger.share(net) > 0.999
    right = net.net.input_grad
    calls: list[int] = []

    def one_is_wrong(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        sign = 1 if len(calls) == 1 else -1
        return right(*arguments) * sign

    net.net.input_grad = one_is_wrong  # type: ignore[method-assign]
    assert 0.1 < ledger.share(net) < 0.9


# chosen -------------------------------------------------------------------------------------------------------
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device with streams, on which a trial has two nets."""
    lacking = build.lacking
    monkeypatch.setattr(candidates, "TRIED", {"cpu": ("by_hand", build.HALVES)})
    monkeypatch.setattr(build, "lacking", lambda name, d: "" if name == build.HALVES else lacking(name, d))


@pytest.mark.usefixtures("offered", "streams")
def test_it_is_taken_where_it_is_fastest(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts(monkeypatch)
    monkeypatch.setattr(HalvesNet, "variant", build.HALVES, raising=False)
    faster(monkeypatch, build.HALVES)
    train.run(config("--epochs=1", "--data.batch_size=31"), tmp_path, quiet=True)
    told = record(tmp_path)
    assert told["chosen"]["name"] == "halves fp32, captured"
    assert not told["fallbacks"]
    assert "halves fp32" not in refusals(tmp_path)  # without a graph it is not tried
    trainer = begun(tmp_path, "--epochs=1", "--data.batch_size=31")
    assert isinstance(trainer.step.net, HalvesNet)


@pytest.mark.usefixtures("offered", "streams")
def test_where_it_fails_the_next_best_goes_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts(monkeypatch)
    monkeypatch.setattr(HalvesNet, "variant", build.HALVES, raising=False)
    faster(monkeypatch, build.HALVES)
    pass_ = HalvesNet.input_grad
    monkeypatch.setattr(HalvesNet, "input_grad", failing(MEMORY))
    assert begun(tmp_path / "at the start").engine.record.chosen.net == "by_hand"
    assert refusals(tmp_path / "at the start")["halves fp32, captured"] == str(MEMORY).split("\n")[0]
    monkeypatch.setattr(HalvesNet, "input_grad", pass_)
    monkeypatch.setenv("MWPB_CACHE", str(tmp_path / "other cache"))
    engine = (trainer := begun(tmp_path / "later")).engine
    assert engine.record.chosen.net == "halves"
    monkeypatch.setattr(HalvesNet, "input_grad", failing(MEMORY))
    engine.begin(6, 0, trainer._key(6))
    assert engine.record.chosen.net == "by_hand"
    assert "engine: halves fp32, captured: CUDA out of memory" in capsys.readouterr().err


def test_never_on_the_cpu(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"^precision.engine: halves runs on two CUDA streams; take by_hand"):
        begun(tmp_path, "--precision.engine=halves")


@pytest.mark.usefixtures("streams")
def test_a_model_that_cannot_be_folded_is_left_whole(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts(monkeypatch)
    monkeypatch.setattr(build, "make_net", lambda model, precision, *a, **k: build.EagerNet(model, precision))
    trainer = begun(tmp_path, "--precision.engine=halves")
    assert not isinstance(trainer.step.net, HalvesNet)
    assert trainer.engine.record.chosen.net == "eager"


@pytest.mark.gpu
def test_both_halves_on_a_gpu() -> None:
    """Ten steps on real streams, eager and from a graph: the whole's loss and images within roundings."""
    from mwpb_fast.engine.recorder import WARM_UP, recorder_for

    cuda, torch_key = torch.device("cuda"), batch(1, 33)
    given, key = Batch(*(t.to(cuda) for t in torch_key[0])), torch_key[1].to(cuda)
    step = make_step()
    step.model.to(cuda).eval()
    from mwpb_fast.engine.precision import Precision

    precision = Precision(cuda, torch.float32, torch.channels_last, oracle=False)
    whole = TwinNet(step.model, precision, given.x, variant=BY_HAND)
    net, radius, found = HalvesNet(whole, cuda), torch.full((33,), 0.03, device=cuda), []
    for one in (whole, net):
        found.append(AT.attack(one, given, None, radius, cross_entropy, key))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.01)
    recorder, made = recorder_for(cuda), []

    def work() -> None:
        made[:] = [AT.attack(net, given, None, radius, cross_entropy, key)]

    for _ in range(WARM_UP):
        recorder.warm_up(work)
    recorder.capture(work)
    for _ in range(5):
        recorder.replay()
        torch.testing.assert_close(made[0], found[1], rtol=0, atol=0.01)
    recorder.close()
