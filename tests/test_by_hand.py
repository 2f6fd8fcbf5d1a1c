"""The twin's gradient by hand, against autograd's over the same layers and the model itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from twin_cases import CPU32, MODELS, Operators, descend, needs_bf16, ours, randomise, same

from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import BY_HAND, ONE_KERNEL, TwinNet

NAMES = [name for name in MODELS if name != "example"]


# the reference of the kernel's operations, which serves the CPU, is slow: it takes the narrow models
NARROW = ("wrn-16-2", "smallresnet-5", "vgg", "assorted")
by_each = pytest.mark.parametrize(
    ("name", "variant"), [*((n, BY_HAND) for n in NAMES), *((n, ONE_KERNEL) for n in NARROW)]
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
    with pytest.raises(ValueError, match="no variant 'best' of the twin; there are plain, by_hand, one_kernel"):
        TwinNet(ours("smallresnet-4")(), CPU32, torch.rand(2, 3, 8, 8), variant="best")
