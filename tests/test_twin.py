"""The attack twin against the model that it stands for."""

from __future__ import annotations

import copy
import importlib
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twin_cases import (
    CPU32,
    MODELS,
    ROOT,
    Assorted,
    Operators,
    descend,
    example_resnet,
    needs_bf16,
    ours,
    randomise,
    same,
)

from mwpb_fast.attacks import pgd
from mwpb_fast.engine.layers import EPILOGUE, FUSED, PLAIN, FoldedConv, FoldedLinear, FoldedNorm
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.twin import TwinNet
from mwpb_fast.inner_losses import gradient_of
from mwpb_fast.method import Batch


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = MODELS[request.param]
    model = build()
    return model.eval() if request.param == "example" else randomise(model), torch.rand(shape)


def test_float32_twin_equals_the_model(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    same(TwinNet(model, CPU32, x), model, x)
    same(TwinNet(model, CPU32, x), model, x.contiguous(memory_format=torch.channels_last))


def test_every_norm_of_the_residual_nets_is_folded_or_fused() -> None:
    model = randomise(MODELS["resnet-18"][0]())
    twin = TwinNet(model, CPU32, torch.rand(2, 3, 32, 32))
    kinds = [type(layer) for layer in twin.layers]
    assert (kinds.count(FoldedConv), kinds.count(FoldedLinear), kinds.count(FoldedNorm)) == (20, 1, 0)
    assert sum(layer.relu for layer in twin.layers) == 17
    assert not any(node.op == "call_function" and node.target is F.relu for node in twin.graph.graph.nodes)
    model = randomise(MODELS["preactresnet-18"][0]())
    twin = TwinNet(model, CPU32, torch.rand(2, 3, 32, 32))
    kinds = [type(layer) for layer in twin.layers]
    # the first norm of each of 8 blocks reads what the skip reads too, and the last norm follows an addition
    assert kinds.count(FoldedNorm) == 9
    assert all(layer.relu for layer in twin.layers if isinstance(layer, FoldedNorm))
    with Operators() as operators:
        twin.input_grad(torch.rand(2, 3, 32, 32), descend(torch.zeros(2, dtype=torch.int64)))
    called = [name for name, _ in operators.calls]
    assert called.count("mwpb::scale_bias_relu") == called.count("mwpb::scale_bias_relu_backward") == 9
    assert not any("batch_norm" in name for name in called)


def test_fold_in_closed_form() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.25), nn.Flatten()).eval()
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[0].bias.fill_(5.0)
        model[1].running_mean.fill_(1.0)
        model[1].running_var.fill_(3.75)  # with eps the deviation is 2
        model[1].weight.fill_(4.0)
        model[1].bias.fill_(7.0)
    twin = TwinNet(model, CPU32, torch.rand(2, 1, 1, 1))
    (layer,) = twin.layers
    assert layer.weight.item() == pytest.approx(3 * 4 / 2)
    assert layer.bias.item() == pytest.approx((5 - 1) * 4 / 2 + 7)


@needs_bf16
def test_bfloat16_twin_is_close(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    twin, eager = TwinNet(model, CPU32, x, torch.bfloat16), EagerNet(model, CPU32)
    y = torch.arange(len(x)) % 4
    logits, expected = twin.logits(x), eager.logits(x)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
    gradient, expected = twin.input_grad(x, descend(y)), eager.input_grad(x, descend(y))
    assert gradient.dtype == torch.float32
    agreeing = expected.abs()[gradient.sign() == expected.sign()].sum() / expected.abs().sum()
    assert agreeing >= 0.95  # random weights; the ledger's 0.995 is for trained ones, on real images
    for layer in twin.layers:
        if isinstance(layer, FoldedConv) and layer.weight.shape[1] > 4:
            assert layer.weight.dtype == torch.bfloat16
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_reads_the_image_is_not_rounded_on_any_device() -> None:
    stem, later = (nn.Conv2d(channels, 8, 3, device="meta") for channels in (3, 8))
    for source, dtype in ((stem, torch.float32), (later, torch.bfloat16)):
        layer = FoldedConv("conv", source, None, True)
        layer.lower(torch.bfloat16)
        assert (layer.weight.dtype, layer.dtype) == (dtype, torch.bfloat16)


@pytest.mark.parametrize("measured", [False, True])
def test_cudnn_measures_nothing_for_the_few_images_of_the_check(
    monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    seen, convolution = set(), torch.conv2d
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", measured)
    look = lambda *words: (seen.add(torch.backends.cudnn.benchmark), convolution(*words))[1]  # noqa: E731
    monkeypatch.setattr(torch, "conv2d", look)
    model, x = randomise(ours("smallresnet-8")()), torch.rand(2, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    assert seen == {False}
    twin.logits(x)
    assert seen == {False, measured}


@needs_bf16
def test_bfloat16_ledger_on_real_images(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    ledger = importlib.import_module("equivalence")
    model = example_resnet().eval()
    x, y = ledger.real_images(shared_data, per_class=4)
    twin = TwinNet(model, CPU32, x, torch.bfloat16)
    row = ledger.gradient_agreement(EagerNet(model, CPU32), twin, x, y)
    assert row["mass_agreeing"] >= 0.995


# refresh ------------------------------------------------------------------------------------------------------


def test_twin_follows_training_at_refresh(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    twin = TwinNet(model, CPU32, x)
    before = twin.logits(x)
    model.train()
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 4)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    model.eval()
    if not isinstance(model, Assorted):  # whose bare parameter is read live
        assert torch.equal(twin.logits(x), before)
    twin.refresh()
    assert not torch.equal(twin.logits(x), before)
    same(twin, model, x)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_refresh_is_in_place_and_multi_tensor(dtype: torch.dtype) -> None:
    counts = []
    for name in ("smallresnet-4", "wrn-16-1", "resnet-18"):
        model = randomise(ours(name)())
        twin = TwinNet(model, CPU32, torch.rand(2, 3, 8, 8), dtype)
        tensors = [t for layer in twin.layers for t in vars(layer).values() if isinstance(t, Tensor)]
        pointers = [t.data_ptr() for t in tensors]
        with Operators() as operators:
            twin.refresh()
        names = [name for name, _ in operators.calls]
        views = ("aten::view", "aten::detach", "aten::alias")
        work = [name for name in names if name not in views]
        assert all(name.startswith("aten::_foreach_") and name.partition(".")[0].endswith("_") for name in work)
        counts.append(len(work))
        after = [t for layer in twin.layers for t in vars(layer).values() if isinstance(t, Tensor)]
        assert [t.data_ptr() for t in after] == pointers
        memory = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with memory as profile:
            twin.refresh()
        assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) == 0
    assert counts[0] == counts[-1] <= 13  # whatever the depth


# what the twin does not touch or compute ----------------------------------------------------------------------


def test_model_is_untouched(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    model.train()
    list(model.modules())[-1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    strides = [p.stride() for p in model.parameters()]
    twin = TwinNet(model, CPU32, x)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    image = x.clone()
    twin.input_grad(x, descend(torch.zeros(len(x), dtype=torch.int64)))
    assert torch.equal(x, image)
    assert x.grad is None
    assert not x.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [p.stride() for p in model.parameters()] == strides
    assert [name for name, _ in model.named_modules()] == names
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("implementation", [PLAIN, FUSED, EPILOGUE])
def test_only_the_input_gradient_is_computed(implementation: str) -> None:
    model, x = randomise(ours("wrn-16-1")()), torch.rand(2, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    for layer in twin.layers:
        if isinstance(layer, FoldedConv) and (layer.relu or implementation != EPILOGUE):
            layer.implementation = implementation
    same(twin, model, x)
    with Operators() as operators:
        twin.input_grad(x, torch.ones_like)
    backward = [args for name, args in operators.calls if name == "aten::convolution_backward"]
    assert len(backward) == sum(isinstance(layer, FoldedConv) for layer in twin.layers)
    assert all(list(args[-1]) == [True, False, False] for args in backward)
    # the final linear layer's input gradient is the one matrix product of the backward
    assert sum(name.startswith("aten::mm") for name, _ in operators.calls) == 1
    assert not any("local_scalar" in name or "nonzero" in name for name, _ in operators.calls)


# attacks ------------------------------------------------------------------------------------------------------


def test_pgd_with_twin_equals_pgd_with_model() -> None:
    model, x = randomise(ours("wrn-16-2")()), torch.rand(4, 3, 16, 16)
    x = x.contiguous(memory_format=torch.channels_last)
    y, index = torch.arange(4), torch.arange(4)
    radius = torch.full((4,), 8 / 255)
    attack = pgd.Config(steps=3, start="none", step_ratio=Fraction(1, 3)).build()
    inner = gradient_of(lambda logits, clean, y: F.cross_entropy(logits, y, reduction="none"))
    key = torch.tensor([7])
    adversarial, losses = [], []
    for net in (EagerNet(model, CPU32), TwinNet(model, CPU32, x)):
        adversarial.append(attack(net, Batch(x, y, index), None, radius, inner, key))
        losses.append(F.cross_entropy(EagerNet(model, CPU32).logits(adversarial[-1]), y))
    # gradients near zero may take the other sign in rounding: a few pixels of a thousand
    assert ((adversarial[0] - adversarial[1]).abs() > 1e-4).float().mean() <= 5e-3
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    assert losses[0] > F.cross_entropy(EagerNet(model, CPU32).logits(x), y)


# the plain path -----------------------------------------------------------------------------------------------
