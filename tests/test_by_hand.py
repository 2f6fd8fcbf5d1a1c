"""The twin's gradient by hand, against autograd's over the same layers and the model itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mwpb_kernels as ops
import pytest
import torch
from torch import Tensor
from twin_cases import CPU32, MODELS, Operators, descend, needs_bf16, ours, randomise, same

from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import BY_HAND, BY_HAND_STEM, ONE_KERNEL, ONE_KERNEL_STEM, TwinNet
from mwpb_fast.method import Net

NAMES = [name for name in MODELS if name != "example"]


# the reference of the kernel's operations, which serves the CPU, is slow: it takes the narrow models
NARROW = ("wrn-16-2", "smallresnet-5", "vgg", "assorted")
STEMS = (BY_HAND_STEM, ONE_KERNEL_STEM)
by_each = pytest.mark.parametrize(
    ("name", "variant"),
    [*((n, BY_HAND) for n in NAMES), *((n, v) for v in (ONE_KERNEL, *STEMS) for n in NARROW)],
)


@by_each
def test_it_is_the_models_gradient(name: str, variant: str) -> None:
    """In float32: BasicBlock, Bottleneck, pre-activation, with and without a projected skip, and odd graphs."""
    build, shape = MODELS[name]
    model, x = randomise(build()), torch.rand(shape)
    twin = TwinNet(model, CPU32, x, variant=variant)
    assert twin.by_hand is not None
    same(twin, model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    twin.refresh()
    same(twin, model, x)


@pytest.mark.parametrize(
    ("name", "variant"),
    [("resnet-18", BY_HAND), ("preactresnet-18", BY_HAND), ("wrn-16-2", BY_HAND), ("wrn-16-2", ONE_KERNEL)],
)
def test_it_is_the_models_gradient_in_float64_where_no_relu_is_near_zero(name: str, variant: str) -> None:
    """The model in float64 and the twin in float32, at images where both have the same ReLUs open: then only
    roundings differ."""
    build, (_, *shape) = MODELS[name]
    model, x = randomise(build()), torch.rand(24, *shape)
    twin = TwinNet(model, CPU32, x, variant=variant)
    gradient = twin.input_grad(x, descend(y := torch.arange(24) % 10)).double()
    leaf = x.double().requires_grad_()
    logits = model.double()(leaf)
    (exact,) = torch.autograd.grad(logits, leaf, descend(y)(logits.detach()).double())
    apart = (gradient - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert apart.median() <= 1e-5


@needs_bf16
@by_each
def test_in_bfloat16_it_is_the_plain_twins_within_rounding(name: str, variant: str) -> None:
    """The sums of bias and skip are rounded once, where the plain twin's are rounded twice."""
    build, shape = MODELS[name]
    model, x = randomise(build()), torch.rand(shape)
    plain, by_hand = (TwinNet(model, CPU32, x, torch.bfloat16, v) for v in ("plain", variant))
    logits = plain.logits(x)
    assert (by_hand.logits(x) - logits).abs().max() <= 4e-2 * logits.abs().max()
    y = torch.arange(len(x)) % 4
    one, other = (net.input_grad(x, descend(y)).flatten(1) for net in (plain, by_hand))
    assert one.dtype == other.dtype == torch.float32
    assert torch.cosine_similarity(one, other).median() >= 0.95


def test_a_layer_has_one_pass_forward_and_one_backward() -> None:
    model, x = randomise(ours("resnet-18")()), torch.rand(2, 3, 16, 16)
    twin = TwinNet(model, CPU32, x, variant=BY_HAND)
    with Operators() as seen:
        twin.input_grad(x, torch.ones_like)
    called = [name for name, _ in seen.calls]
    assert called.count("mwpb::bias_add_relu_") == called.count("mwpb::gated_sum") == 17
    assert called.count("aten::convolution_backward") == called.count("aten::convolution") == 20
    assert not any(a[2] is not None for name, a in seen.calls if name == "aten::convolution")  # no bias
    spared = ("aten::relu", "aten::relu_", "aten::threshold_backward", "aten::add", "aten::add_")
    assert not [name for name in called if name.partition(".")[0] in spared]


def test_in_one_kernel_there_is_nothing_but_convolutions() -> None:
    """All but the end of the last block, whose gradient comes from the pooling."""
    model, x = randomise(ours("resnet-18")()), torch.rand(1, 3, 8, 8)
    twin = TwinNet(model, CPU32, x, variant=ONE_KERNEL)
    with Operators() as seen:
        twin.input_grad(x, torch.ones_like)
    called = [name for name, _ in seen.calls if name.startswith("mwpb::")]
    counts = {"mwpb::conv_relu": 17, "mwpb::conv_input_grad": 20, "mwpb::gated_sum": 1}
    assert {name: called.count(name) for name in called} == counts


# the layer that reads the image -------------------------------------------------------------------------------
@needs_bf16
@pytest.mark.parametrize("variant", STEMS)
def test_the_stem_and_the_step_are_one_operation_each(variant: str) -> None:
    """No pass over the stem's result or gradient in float32, and no gradient of the image."""
    model, x = randomise(ours("resnet-18")()), torch.rand(2, 3, 8, 8)
    plain, stem = (TwinNet(model, CPU32, x, torch.bfloat16, v) for v in (variant.removesuffix("_stem"), variant))
    counted = []
    for twin in (plain, stem):
        with Operators() as seen:
            twin.linf_step_(x.clone(), torch.ones_like, x, torch.full((2,), 0.1), torch.full((2,), 0.05))
        counted.append(Counter(name.partition(".")[0] for name, _ in seen.calls))
    # without the reference's own
    assert counted[1]["mwpb::stem_conv"] == counted[1]["mwpb::stem_step_"] == 1
    assert counted[0]["mwpb::linf_step_"] == 1
    assert counted[1]["mwpb::linf_step_"] == 0
    for name in ("aten::convolution", "aten::convolution_backward"):
        assert counted[0][name] - counted[1][name] == 1


@needs_bf16
@pytest.mark.parametrize(("name", "fused"), [("wrn-16-2", True), ("smallresnet-5", True), ("assorted", False)])
@pytest.mark.parametrize("variant", STEMS)
def test_a_step_is_that_along_its_own_gradient(name: str, fused: bool, variant: str) -> None:
    """Without a ReLU at the stem, with one, and behind a norm, where the step is not fused: signs apart where the
    roundings of the weights decide them."""
    build, (_, *shape) = MODELS[name]
    model, x = randomise(build()), torch.rand(6, *shape)
    twin = TwinNet(model, CPU32, x, torch.bfloat16, variant)
    y, radius = torch.arange(6) % 4, torch.linspace(0.01, 0.06, 6)
    gradient = twin.input_grad(x, descend(y))
    expected = ops.linf_step_(x.clone(), gradient, x, radius, radius / 4)
    found = x.clone()
    with Operators() as seen:
        twin.linf_step_(found, descend(y), x, radius, radius / 4)
    assert any(name.startswith("mwpb::stem_step_") for name, _ in seen.calls) == fused
    sure = gradient.abs() > 1e-3 * gradient.abs().mean()
    assert torch.equal(found[sure], expected[sure])


@needs_bf16
@pytest.mark.parametrize("variant", STEMS)
def test_the_split_stem_is_as_good_as_a_float32_one(variant: str) -> None:
    """The gradient's signs are those of the model in float32 as often as with the stem in float32; with its
    weights and image rounded they are not."""
    model, x = randomise(ours("wrn-16-2")()), torch.rand(24, 3, 16, 16)
    y = torch.arange(24) % 10
    exact = EagerNet(model, CPU32).input_grad(x, descend(y))

    def share(twin: TwinNet) -> float:
        moved = x.clone()
        twin.linf_step_(moved, descend(y), x, torch.full((24,), 0.5), torch.full((24,), 0.01))
        inside = (x > 0.01) & (x < 0.99)
        agree = (moved - x).sign() == exact.sign()
        return (exact.abs()[agree & inside].sum() / exact.abs()[inside].sum()).item()

    float32, split = (
        share(TwinNet(model, CPU32, x, torch.bfloat16, v)) for v in (variant.removesuffix("_stem"), variant)
    )
    assert abs(split - float32) < 1e-3
    rounded = TwinNet(model, CPU32, x, torch.bfloat16, BY_HAND)
    stem = rounded.layers[0]
    stem.weight = stem.weight.bfloat16()
    assert share(rounded) < float32 - 5e-4


def test_a_net_of_ones_own_steps_along_its_gradient() -> None:
    """A net says no more than it must: the step has a default."""

    class Constant(Net):
        def logits(self, x: Tensor) -> Tensor:
            return x.flatten(1)

        def input_grad(self, x: Tensor, dlogits: Any) -> Tensor:
            return torch.ones_like(x)

        def refresh(self) -> None:
            pass

    x = torch.full((2, 1, 2, 2), 0.5)
    moved = x.clone()
    Constant().linf_step_(moved, torch.ones_like, x, torch.full((2,), 0.25), torch.tensor([0.125, 0.5]))
    assert moved[:, 0, 0, 0].tolist() == [0.625, 0.75]


def test_no_activation_is_kept() -> None:
    """Between forward and backward, of every layer the gate alone: a sixteenth of bf16's bytes."""
    model, x = randomise(ours("resnet-18")()), torch.rand(2, 3, 16, 16)
    twin = TwinNet(model, CPU32, x, variant=BY_HAND)
    assert twin.by_hand is not None
    _, tape, _ = twin.by_hand._forward(x)
    kept = [cell.cell_contents for _, backward in tape for cell in backward.__closure__ or ()]
    assert max(t.numel() for t in kept if isinstance(t, Tensor)) <= 2 * 16 * 16 * 64 // 8


def test_its_layers_can_be_tuned() -> None:
    """It does not ask for what is chosen."""
    model, x = randomise(ours("smallresnet-4")()), torch.rand(2, 3, 8, 8)
    twin = TwinNet(model, CPU32, x, variant=BY_HAND)
    assert len(tune(twin, x, repeats=1)) == len(twin.layers) - 1
    same(twin, model, x)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="no variant 'best' of the twin; there are plain, by_hand, one_kernel, "):
        TwinNet(ours("smallresnet-4")(), CPU32, torch.rand(2, 3, 8, 8), variant="best")
