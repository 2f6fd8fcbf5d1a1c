"""The natural pass and the clipping of gradients: switches of the training pass, whatever the method."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import assert_same, assert_same_result, batch, capture, make_step, values
from method_cases import Crafted, method
from test_train import StopAfter

from mwpb_fast import train
from mwpb_fast.budgets import fixed
from mwpb_fast.config import ConfigError, OptimConfig, check_axes, load, names, recipe, resolve
from mwpb_fast.method import Method
from mwpb_fast.optim import _guarded, make_optimizer
from mwpb_fast.perturbations import awp
from mwpb_fast.runs import checkpoint, trace
from mwpb_fast.step import Step
from mwpb_fast.system.signals import Interrupted


def shifted(**axes: Any) -> Method:
    """An attack that is known without the model."""
    shift = Crafted(lambda net, batch, *rest: (batch.x * 0.75 + 0.125).flip(3))
    return method(attack=shift, budget=fixed.Config().build(), **axes)


# natural pass -------------------------------------------------------------------------------------------------
def test_the_natural_pass_moves_the_running_statistics_first_and_nothing_else() -> None:
    plain, step = make_step("eager"), make_step("eager", natural_pass=True)
    model, (images, key) = copy.deepcopy(step.model).double().train(), batch(0)
    x = images.x.double()
    for seen in (x, (x * 0.75 + 0.125).flip(3)):
        inputs: dict[torch.nn.Module, torch.Tensor] = {}
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        hooks = [m.register_forward_hook(lambda m, i, o, kept=inputs: kept.update({m: i[0]})) for m in norms]
        before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]  # type: ignore[union-attr]
        model(seen)
        for norm, (mean, var) in zip(norms, before, strict=True):
            z = inputs[norm].detach()
            norm.running_mean = 0.9 * mean + 0.1 * z.mean((0, 2, 3))
            norm.running_var = 0.9 * var + 0.1 * z.var((0, 2, 3), unbiased=True)
        for hook in hooks:
            hook.remove()
    for each in (plain, step):
        assert each(images, key, shifted()).finite
    buffers = dict(model.named_buffers())
    for name, value in step.model.named_buffers():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), buffers[name], rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert value == 2
    for one, other in zip(plain.model.parameters(), step.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_the_natural_pass_comes_before_the_weights_are_perturbed() -> None:
    """Natural images at w in train mode; the perturbation is found at w; the loss is taken at w + v."""
    step, (images, key) = make_step("eager", natural_pass=True), batch(0)
    seen: list[tuple[bool, bool, bool, bool]] = []
    weight = next(p for p in step.model.parameters() if p.dim() == 4)
    before = weight.detach().clone()

    def look(module: torch.nn.Module, given: Any, result: torch.Tensor) -> None:
        natural, tracked = torch.equal(given[0], images.x), norm.track_running_stats
        seen.append((natural, tracked, result.requires_grad, torch.equal(weight, before)))

    norm = next(m for m in step.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    step.model.register_forward_hook(look)
    assert step(images, key, shifted(perturb=awp.Config(gamma=0.1).build())).finite
    assert seen == [(True, True, False, True), (False, False, True, True), (False, True, True, False)]


def test_a_natural_pass_that_is_not_finite_is_undone() -> None:
    step, (images, key) = make_step("eager", natural_pass=True), batch(0)
    before = values(step)
    images.x[2, 1, 3, 3] = math.nan
    assert not step(images, key, shifted()).finite
    after = values(step)
    kept = [name for name, value in before.items() if value.is_floating_point()]
    assert_same({name: after[name] for name in kept}, {name: before[name] for name in kept})


@pytest.mark.parametrize("name", names("objectives"))
def test_an_objective_knows_whether_it_sends_the_natural_images(name: str) -> None:
    objective, step = load("objectives", name).Config().build(), make_step("eager")
    x, y, _ = batch(0)[0]
    seen: list[bool] = []
    step.model.train().register_forward_hook(lambda m, i, o: seen.append(torch.equal(i[0], x)))
    x_adv, rate = (x * 0.75 + 0.125).flip(3), torch.full(y.shape, 0.5)
    objective.outer(step.model, x, x_adv, y, {"counted": rate > 0, "second": x_adv, "hits": rate})
    assert objective.sends_natural is any(seen)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--objective=at"], False),
        (["--objective=wat"], False),
        (["--objective=trades"], True),
        (["--objective=mart"], True),
        (["--objective=wat", "--objective.base=trades"], True),
        (["--objective=st", "--attack=squeeze"], True),
        (["--objective=mma", "--attack=anpgd", "--budget=fixed"], True),
        (["--objective=mma", "--attack=anpgd", "--budget=fixed", "--objective.clean_weight=0"], False),
    ],
)
def test_a_second_natural_pass_is_refused(words: list[str], refused: bool) -> None:
    config = resolve(recipe("table1.at"), [], [*words, "--natural_pass=true"])
    check_axes(dataclasses.replace(config, natural_pass=False))
    if refused:
        with pytest.raises(ConfigError, match=r"natural_pass: objective .* sends the natural images"):
            check_axes(config)
    else:
        check_axes(config)


# clipping -----------------------------------------------------------------------------------------------------
def with_gradients(step: Step, scale: float = 1.0) -> Step:
    generator = torch.Generator().manual_seed(3)
    for parameter in step.parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator).contiguous(
            memory_format=torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
        )
    return step


class Unaware(torch.optim.SGD):
    """Knows nothing of `found_inf`, as apex's."""

    def step(self, closure: Any = None) -> Any:
        vars(self).pop("found_inf", None)
        return super().step(closure)


@pytest.mark.parametrize("clip_norm", [0.5, 1e4])
@pytest.mark.parametrize("kind", ["torch", "scaled", "apex", "apex scaled"])
def test_clipping_is_that_of_pytorch_to_the_bit(kind: str, clip_norm: float) -> None:
    """Below the norm and above it; with loss scaling by a power of two; with an optimiser like apex's."""
    step, other = make_step("eager", clip_norm=clip_norm), with_gradients(make_step("eager"))
    scale = 1024.0 if "scaled" in kind else 1.0
    if "apex" in kind:
        step.optimizer = _guarded(Unaware)(step.parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
        other.optimizer = torch.optim.SGD(other.parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    if "scaled" in kind:
        step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        step.scaler.scale(torch.zeros(1))
    with_gradients(step, scale)
    theirs = torch.nn.utils.clip_grad_norm_(other.parameters, clip_norm)
    other.optimizer.step()
    finite, norm = step.update(torch.tensor(1.0))
    assert finite
    assert torch.equal(norm, theirs)
    for one, its in zip(step.parameters, other.parameters, strict=True):
        assert torch.equal(one, its)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_is_left_out_with_clipping_too(scaled: bool) -> None:
    step = with_gradients(make_step("eager", clip_norm=0.5))
    if scaled:
        step.scaler = torch.amp.GradScaler("cpu")
        step.scaler.scale(torch.zeros(1))
    step.parameters[3].grad[0] = math.inf  # type: ignore[index]
    before = [p.detach().clone() for p in step.parameters]
    finite, _ = step.update(torch.tensor(1.0))
    assert finite == scaled  # the scaler leaves such steps out in the ordinary course of things
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))


def test_the_norm_of_an_unclipped_step_is_told_where_it_is_known() -> None:
    step, (images, key) = make_step("eager"), batch(0)
    result = step(images, key, shifted())
    gradients = [p.grad for p in step.parameters if p.grad is not None]
    assert torch.equal(result.norm, torch.nn.utils.get_total_norm(gradients))
    step.scaler = torch.amp.GradScaler("cpu")
    assert step(images, key, shifted()).norm.isnan()


@pytest.mark.parametrize("perturb", [{}, {"perturb": awp.Config().build()}])
def test_a_captured_step_with_both_switches_is_the_eager_one(perturb: dict[str, Any]) -> None:
    switches: dict[str, Any] = {"natural_pass": True, "clip_norm": 0.1, "ema": 0.9}
    eager, recorded, asked = make_step(**switches), make_step(**switches), method(**perturb)
    captured = capture(recorded)
    for number in range(3):
        inputs = (*batch(number), asked)
        assert captured.verify(*inputs) == []
        result = captured(*inputs)
        assert_same_result(eager(*inputs), result)
        assert result.norm > 0.1
    assert_same(values(eager), values(recorded))


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_norms_without_sense_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        OptimConfig(clip_norm=value)
    assert make_optimizer(torch.nn.Linear(2, 2), OptimConfig(clip_norm=1.0))


# a run --------------------------------------------------------------------------------------------------------
def test_a_run_with_both_switches_says_how_it_clipped_and_goes_on(tmp_path: Path) -> None:
    """Its records have the norms; stopped in the middle of an epoch it comes to the same end."""
    words = ["--epochs=2", "--warmup_epochs=1", "--data.subset=200", "--model.name=smallresnet-8"]
    words += ["--attack.steps=1", "--data.batch_size=64", "--natural_pass=true", "--optim.clip_norm=0.7"]
    config, states = resolve(recipe("digits.mwpb_at"), [], words), []
    for name, cut in (("whole", 1000), ("cut", 4)):
        with contextlib.suppress(Interrupted):
            train.Trainer(config, tmp_path / name, StopAfter(cut), quiet=True).train()  # type: ignore[arg-type]
        train.run(config, tmp_path / name, quiet=True)
        states.append(checkpoint.read_newest(tmp_path / name / "checkpoints", "last")[1])  # type: ignore[index]
    for one, other in zip(*(state["model"].values() for state in states), strict=True):
        assert torch.equal(one, other)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for record in map(json.loads, lines):
        assert 0.7 < record["norm_mean"] <= record["norm_max"]
        assert 0 < record["clipped"] <= 1
        assert record["radius_p05"] <= record["radius_p95"]


def test_figures_of_an_epoch_by_hand() -> None:
    """Four steps: one bad, one whose scaled gradient had overflowed, one above the norm of 1 and one below."""
    radius = torch.arange(21.0)
    rows = torch.stack(
        [
            trace.row(torch.tensor(1.0), radius, torch.tensor(finite), torch.tensor(norm))
            for finite, norm in ((False, 9.0), (True, math.inf), (True, 3.0), (True, 1.0))
        ]
    )
    found = trace.figures(rows, clip_norm=1.0)
    assert (found["norm_mean"], found["norm_max"], found["clipped"]) == (2.0, 3.0, 0.5)
    quantiles = {name: found[name] for name in trace.QUANTILES}
    assert quantiles == {
        "radius_p05": 1, "radius_p25": 5, "radius_p50": 10, "radius_p75": 15, "radius_p95": 19,
    }  # fmt: skip
    old = trace.figures(trace.widened(rows[1:, :5]))
    assert math.isnan(old["norm_mean"])
    assert math.isnan(old["norm_max"])
    assert "clipped" not in old
