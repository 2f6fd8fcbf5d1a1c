"""The attack twin against the model that it stands for."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mwpb_fast.attacks import pgd
from mwpb_fast.attacks.inner import gradient_of
from mwpb_fast.engine.conv import FUSED, PLAIN, FoldedConv, FoldedLinear, FoldedNorm
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import Precision, cpu_has_bf16
from mwpb_fast.engine.tune import tune
from mwpb_fast.engine.twin import EngineWarning, TwinNet, make_net
from mwpb_fast.models import build_model

CPU32 = Precision(torch.device("cpu"), torch.float32, torch.channels_last, oracle=False)
ORACLE = Precision(torch.device("cpu"), torch.float32, torch.contiguous_format, oracle=True)
ROOT = Path(__file__).resolve().parents[1]
NORMALIZE = ((0.49, 0.48, 0.44), (0.25, 0.24, 0.26))
needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="needs a CPU with bfloat16")


class VGG(nn.Module):
    """Biases, in-place ReLUs, pooling, dropout, `view`, a batch norm after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (8, "M", 16, 16, "M", 24, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(channels, width, 3, padding="same"),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.hidden, self.norm = nn.Linear(24 * 4, 20), nn.BatchNorm1d(20, affine=False)
        self.drop, self.classifier = nn.Dropout(), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.relu(self.norm(self.hidden(x.view(x.size(0), -1))))
        return self.classifier(self.drop(x))


class Assorted(nn.Module):
    """Batch norm on the input, a scaled parameter, every spelling of addition and ReLU, groups, a convolution
    that is used twice, an addition that must not be fused because its operand is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.BatchNorm2d(3)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.c = nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.gate = nn.Conv2d(8, 1, 1)
        self.head = nn.Linear(8, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.entry(x))
        self.act(x)  # only its effect on x is used
        y = self.b(x)
        y += x
        y = y.relu_() * self.gain
        z = torch.add(self.c(y), x).relu()
        z = self.bn(z.add(self.c(z)))
        w = self.c(z)
        w = torch.relu(w + z) + w
        w = self.gate(w) + w
        v = w + 1  # no operation in place, whatever the 1 looks like
        w = F.relu(input=w) + v
        return self.head(F.adaptive_avg_pool2d(w, 1).flatten(1))


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training; eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def example_resnet() -> nn.Module:
    pytest.importorskip("pyautoattack")
    package = importlib.import_module("pyautoattack.examples.resnet")
    model = package.ResNet18()
    model.load_state_dict(torch.load(Path(package.__file__).with_name("model_test.pt"), map_location="cpu"))
    return model


def ours(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: build_model(name, num_classes=10, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet-18": (ours("resnet-18", normalize=NORMALIZE), (3, 3, 16, 16)),
    "resnet-50": (ours("resnet-50"), (3, 3, 8, 8)),
    "preactresnet-18": (ours("preactresnet-18", normalize=NORMALIZE), (3, 3, 8, 12)),
    "wrn-16-2": (ours("wrn-16-2"), (3, 3, 16, 16)),
    "smallresnet-5": (ours("smallresnet-5", channels=1), (5, 1, 9, 7)),
    "example": (example_resnet, (3, 3, 32, 32)),
    "vgg": (VGG, (5, 3, 16, 16)),
    "assorted": (Assorted, (3, 3, 11, 13)),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = MODELS[request.param]
    model = build()
    return model.eval() if request.param == "example" else randomise(model), torch.rand(shape)


def small(norm: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)]
    return nn.Sequential(*layers[: 1 if not norm else 2], *layers[2:])


def descend(y: Tensor) -> Callable[[Tensor], Tensor]:
    """Gradient of the summed cross-entropy."""
    return lambda logits: (logits.float().softmax(1) - F.one_hot(y, logits.shape[1])).to(logits.dtype)


def same(net: Any, model: nn.Module, x: Tensor) -> None:
    """Logits within 1e-4 of the model's, gradients too but for ReLUs whose argument rounds across zero: those
    are rare, so most images have none, and each moves the gradient of its image by a little."""
    y = torch.arange(len(x)) % 4
    eager, plain = EagerNet(model, CPU32), x.contiguous()  # a `view` in a model wants images so
    logits, expected = net.logits(x), eager.logits(plain)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    gradient, expected = net.input_grad(x, descend(y)), eager.input_grad(plain, descend(y))
    assert gradient.dtype == torch.float32
    error = (gradient - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-30)
    assert error.median() <= 1e-4
    assert error.max() <= 2e-2


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.name(), args))
        return func(*args, **(kwargs or {}))


# parity -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("implementation", [PLAIN, FUSED])
def test_only_the_input_gradient_is_computed(implementation: str) -> None:
    model, x = randomise(ours("wrn-16-1")()), torch.rand(2, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    for layer in twin.layers:
        if isinstance(layer, FoldedConv):
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
        adversarial.append(attack(net, x, y, None, radius, inner, key, index))
        losses.append(F.cross_entropy(EagerNet(model, CPU32).logits(adversarial[-1]), y))
    # gradients near zero may take the other sign in rounding: a few pixels of a thousand
    assert ((adversarial[0] - adversarial[1]).abs() > 1e-4).float().mean() <= 5e-3
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    assert losses[0] > F.cross_entropy(EagerNet(model, CPU32).logits(x), y)


# the plain path -----------------------------------------------------------------------------------------------


def test_train_mode_takes_the_plain_path_and_says_so_once() -> None:
    model, x = randomise(small()), torch.rand(4, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    y = torch.arange(4)
    for set_mode in (model.train, model[1].train):
        model.eval()
        set_mode()
        twin._told = False
        reference = EagerNet(copy.deepcopy(model), CPU32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = twin.logits(x)
            gradient = twin.input_grad(x, descend(y))
        assert [w.category for w in caught] == [EngineWarning]
        assert "train mode" in str(caught[0].message)
        assert torch.equal(logits, reference.logits(x))
        assert torch.equal(gradient, reference.input_grad(x, descend(y)))


class Branching(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Hidden(nn.Sequential):
    """What a trace does not see: half of the input's gradient is cut off."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            half = x / 2
        return super().forward(half + x / 2)


class Random(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), training=True)


def hooked() -> nn.Module:
    model = small()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


class Functional(nn.Sequential):
    """float32 weights that the twin reads live, which bfloat16 activations cannot meet."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self[1](self[0](x)))
        return self[4](self[3](F.conv2d(x, self[0].weight[:, :1].repeat(1, 6, 1, 1), padding=1)))


@needs_bf16
def test_functional_weights_fold_in_float32_alone() -> None:
    model, x = randomise(Functional(*small())), torch.rand(4, 3, 8, 8)
    same(make_net(model, CPU32, x), model, x)
    with pytest.warns(EngineWarning, match="cannot be compared"):
        assert isinstance(make_net(model, CPU32, x, torch.bfloat16), EagerNet)


UNFOLDABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "unknown layer": (lambda: nn.Sequential(nn.GroupNorm(1, 3), *small()), "0: GroupNorm"),
    "control flow": (lambda: Branching(*small()), "torch.fx cannot trace"),
    "hooks": (hooked, "0 has hooks"),
    "no statistics": (
        lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), *small()),
        "layer 0: its batch norm keeps no",
    ),
    "padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), *small()),
        "layer 0: padding mode reflect",
    ),
    "lopsided padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 2, padding="same"), *small()),
        "layer 0: its padding is not symmetric",
    ),
    "hidden gradient": (lambda: Hidden(*small()), "another input gradient"),
    "random": (lambda: Random(*small()), "another logits"),
}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_unfoldable_model_takes_the_plain_path_and_says_why(name: str) -> None:
    build, reason = UNFOLDABLE[name]
    model, x = randomise(build()), torch.rand(4, 3, 8, 8)
    with pytest.warns(EngineWarning, match=reason) as caught:
        net = make_net(model, CPU32, x)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert isinstance(net, EagerNet)
    assert not model.training


def test_oracle_is_never_folded() -> None:
    assert isinstance(make_net(randomise(small()), ORACLE, torch.rand(2, 3, 8, 8)), EagerNet)
    assert isinstance(make_net(randomise(small()), CPU32, torch.rand(2, 3, 8, 8)), TwinNet)


# the choice of implementations --------------------------------------------------------------------------------


def test_choices_are_recorded_and_change_nothing() -> None:
    model, x = randomise(ours("wrn-16-2")()), torch.rand(3, 3, 16, 16)
    twin = TwinNet(model, CPU32, x)
    records = tune(twin, x, repeats=2)
    convolutions = [layer for layer in twin.layers if isinstance(layer, FoldedConv)]
    assert [r["layer"] for r in records] == [layer.name for layer in convolutions]
    assert [r["chosen"] for r in records] == [layer.implementation for layer in convolutions]
    assert all(set(r["milliseconds"]) == {PLAIN, FUSED} and r["reason"] for r in records)
    same(twin, model, x)


def test_layer_without_fused_call_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise RuntimeError("no engine for this shape\nmore")

    monkeypatch.setattr(FoldedConv, "fused", refuse)
    model, x = randomise(ours("smallresnet-4")()), torch.rand(2, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    records = tune(twin, x, repeats=1)
    assert {r["chosen"] for r in records} == {PLAIN}
    assert {r["reason"] for r in records} == {"no fused call: no engine for this shape"}
    same(twin, model, x)


def test_wrong_fused_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FoldedConv, "fused", lambda self, x, skip: self.plain(x, skip) * 1.01)
    model, x = randomise(ours("smallresnet-4")()), torch.rand(2, 3, 8, 8)
    twin = TwinNet(model, CPU32, x)
    records = tune(twin, x, repeats=1)
    assert {r["chosen"] for r in records} == {PLAIN}
    assert all("differs" in r["reason"] for r in records)
