"""NVIDIA apex's FusedSGD as a run's optimiser, on a stand-in; and every way in which it can be missing."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import apex_stand_in
import pytest
import torch
from method_cases import method
from test_optim import CONFIG, gradients, small
from test_step import batch, make_step
from test_train import StopAfter, assert_same, final_state, tiny

from mwpb_fast import optim, train
from mwpb_fast.capture import check_capturable
from mwpb_fast.choice.untouched import untouched
from mwpb_fast.cli import doctor, main
from mwpb_fast.config import ConfigError, OptimConfig
from mwpb_fast.method import Batch
from mwpb_fast.optim import apex_fused_sgd, find_apex, learning_rate, make_optimizer, set_learning_rate
from mwpb_fast.system.signals import Interrupted

APEX_MODULE = re.compile(r"(apex|amp_C)(\.|$)")
APEX = OptimConfig(lr=0.1, drops=(2, 4), fused="apex")
OURS = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "from apex_stand_in import FusedSGD\n",
    "amp_C.py": "from apex_stand_in import multi_tensor_sgd\n",
}


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the module path for packages that are called apex; none is anywhere else, nor left behind."""
    folder = tmp_path_factory.mktemp("site")
    monkeypatch.setattr(sys, "path", [str(folder), *(p for p in sys.path if not (Path(p) / "apex").exists())])
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if APEX_MODULE.match(name)}
    yield folder
    for name in list(sys.modules):
        if APEX_MODULE.match(name):
            del sys.modules[name]
    sys.modules.update(before)


def install(site: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)


@pytest.fixture
def apex(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in as the installed apex; its kernel runs on the CPU."""
    install(site, OURS)
    monkeypatch.setattr(optim, "APEX_DEVICES", ("cpu",))


def test_the_stand_in_is_as_apex_says_of_itself() -> None:
    found, _ = find_apex()
    if found.module is None:
        pytest.skip("NVIDIA apex is not installed here")
    for name in ("__init__", "zero_grad", "step", "get_momentums"):
        theirs, ours = (getattr(c, name) for c in (found.module.FusedSGD, apex_stand_in.FusedSGD))
        these, own = (inspect.signature(f).parameters.values() for f in (theirs, ours))
        assert [(p.name, p.default) for p in these] == [(p.name, p.default) for p in own], name


def test_it_steps_as_pytorchs_does_and_leaves_out_what_is_not_finite(apex: None) -> None:
    """Through drops of the learning rate, and with steps left out, the first one among them."""
    ours, theirs = small(), small()
    one, other = make_optimizer(ours, APEX), make_optimizer(theirs, CONFIG)
    assert isinstance(one, apex_stand_in.FusedSGD)
    for number, left_out in enumerate((True, False, False, True, False), 1):
        for model, optimizer in ((ours, one), (theirs, other)):
            set_learning_rate(optimizer, learning_rate(CONFIG, number))
            optimizer.zero_grad()
            gradients(model, number)
            optimizer.found_inf = torch.tensor(float(left_out))  # type: ignore[attr-defined]
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert one.param_groups[0]["lr"] == learning_rate(CONFIG, 5)
    assert {name for kept in one.state.values() for name in kept} == {"momentum_buffer"}


def test_its_other_promises_hold_under_our_guard(apex: None) -> None:
    """A closure, groups that come later, gradients set to None or zero, scaled ones, float16 weights."""
    model = torch.nn.Linear(3, 2, bias=False)
    half = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    guarded = optim._guarded(apex_fused_sgd([model.weight, half]))(
        [model.weight], lr=0.5, momentum=0.9, set_grad_none=True
    )
    guarded.add_param_group({"params": [half], "lr": 0.25, "momentum": 0.0})
    before = model.weight.detach().clone()

    def closure() -> str:
        model.weight.grad, half.grad = torch.full_like(model.weight, 8.0), torch.full_like(half, 8.0)
        return "loss"

    guarded.found_inf = torch.ones(())
    assert guarded.step(closure) is None  # not even evaluated: the batch was bad
    del guarded.found_inf
    guarded.most_recent_scale = 16.0
    assert guarded.step(closure) == "loss"
    assert torch.equal(model.weight, before - 0.25)
    assert torch.equal(half, torch.full_like(half, 0.875))
    assert guarded.most_recent_scale == 1.0
    guarded.zero_grad()
    assert model.weight.grad is None


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_step_with_it(apex: None, scaled: bool) -> None:
    """zero_grad takes no argument there; loss scaling; weights in channels-last; a trial leaves nothing behind."""
    x, y, index, key = batch()
    of = method()
    steps = [make_step(), make_step()]
    for step, config in zip(steps, (APEX, CONFIG), strict=True):
        step.model.to(memory_format=torch.channels_last)
        step.optimizer = make_optimizer(step.model, config)
        if scaled:
            step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with untouched(steps[0], of):
        steps[0](Batch(x, y, index), key, of)
    assert not any(steps[0].optimizer.state.values())
    for step in steps:
        for _ in range(2):
            assert step(Batch(x, y, index), key, of).finite
    for a, b in zip(steps[0].parameters, steps[1].parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    why = "loss scaling" if scaled else "learning rate is a number.*optim.fused=torch"
    with pytest.raises(ConfigError, match=why):
        check_capturable(steps[0], of)


def test_a_run_with_it_goes_on_to_the_byte_and_is_that_of_pytorchs(apex: None, tmp_path: Path) -> None:
    ours = tiny("--optim.fused=apex", "--data.subset=192")
    train.run(ours, tmp_path / "whole", quiet=True)
    trainer = train.Trainer(ours, tmp_path / "cut", StopAfter(3), quiet=True)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        trainer.train()
    train.run(ours, tmp_path / "cut", quiet=True)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    train.run(tiny("--data.subset=192"), tmp_path / "torch", quiet=True)
    theirs = final_state(tmp_path / "torch")["model"]
    for name, value in final_state(tmp_path / "whole")["model"].items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-2, atol=1e-4)
    with pytest.raises(ConfigError, match=r"other settings \(optim\)"):
        train.run(tiny("--data.subset=192"), tmp_path / "whole", quiet=True)


# where it is not to be had ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_weights_that_it_would_leave_alone_are_refused(apex: None, dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"not of {dtype} on the cpu; take optim.fused=torch"):
        make_optimizer(small().to(getattr(torch, dtype)), APEX)


ABSENT = {
    "missing": ({}, "optional", "NVIDIA apex is not installed; build NVIDIA's from"),
    "a mere folder": ({"apex/readme.txt": ""}, "optional", "NVIDIA apex is not installed"),
    "the Pyramid toolkit, as it is: its own needs are missing": (
        {"apex/__init__.py": "from pyramid_mailer.interfaces import IMailer\n", "apex/models.py": ""},
        "optional",
        "is not NVIDIA's (that of the package index is a Pyramid toolkit)",
    ),
    "another, which imports": ({"apex.py": ""}, "optional", "pip uninstall apex, and build NVIDIA's"),
    "broken": (
        {"apex/__init__.py": "from torch.optim.optimizer import gone\n", "apex/optimizers/__init__.py": ""},
        "broken",
        "NVIDIA apex does not import (ImportError: cannot import name 'gone'",
    ),
    "without FusedSGD": (OURS | {"apex/optimizers/__init__.py": ""}, "broken", "no FusedSGD in this version"),
    "of Python alone": (
        {k: v for k, v in OURS.items() if k != "amp_C.py"},
        "broken",
        "no CUDA kernels: amp_C, its extension, is not installed; build NVIDIA's from its repository, with",
    ),
    "of another PyTorch": (
        OURS | {"amp_C.py": "raise ImportError('undefined symbol')\n"},
        "broken",
        "amp_C, its extension, does not import (ImportError: undefined symbol)",
    ),
    "there, on a CPU": (OURS, "ok", "float32 and float16 on CUDA, not of float32 on the cpu"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_its_absence_is_named_in_one_line(
    name: str, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, status, message = ABSENT[name]
    install(site, files)
    words = ["--optim.fused", "apex", "--precision.device", "cpu", "--model.name", "smallresnet-4"]
    assert main(["train", "digits.mwpb_at", *words, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mwpb-fast: error: optim.fused=apex: ")
    assert message in line
    assert line.endswith("take optim.fused=torch")
    finding = doctor._apex()
    assert finding.status == status
    assert finding.cost.startswith("not needed: ") or status == "ok"
    assert ("Pyramid" in finding.detail) == ("is not NVIDIA's" in line)
