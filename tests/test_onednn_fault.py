"""The way around oneDNN's wrong weight gradients of narrow 1x1 convolutions with stride."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwpb_fast.cli import doctor
from mwpb_fast.engine import onednn_fault, processor
from mwpb_fast.engine.twin import EngineWarning
from mwpb_fast.models import build_model


class Functional(nn.Conv2d):
    """A layer of its own kind, as weight standardisation is written."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), None, self.stride)


LAYERS = {
    "1x1, stride 2": (nn.Conv2d(4, 8, 1, 2), True),
    "1x1, stride 2, no bias": (nn.Conv2d(3, 5, 1, 2, bias=False), True),
    "1x1, strides 1 and 2": (nn.Conv2d(1, 8, 1, (1, 2)), True),
    "a function": (Functional(2, 4, 1, 2, bias=False), True),
    "transposed": (nn.ConvTranspose2d(16, 4, 1, 2, output_padding=1), True),
    "odd": (nn.Conv2d(4, 8, 1, 3), True),
    "1x1, stride 2, padded": (nn.Conv2d(4, 8, 1, 2, 1), False),
    "1x1, stride 1": (nn.Conv2d(4, 8, 1), False),
    "3x3, stride 2": (nn.Conv2d(4, 8, 3, 2, 1), False),
    "1x1, stride 2, wide": (nn.Conv2d(16, 8, 1, 2), False),
    "1x1, stride 2, groups": (nn.Conv2d(4, 8, 1, 2, groups=2), False),
}


@pytest.fixture
def detour() -> Iterator[Any]:
    """As on a processor with AVX-512. `calls`: the strides with which weight gradients were asked for."""
    before = onednn_fault._detour
    if before is not None:
        before.remove()
    made: Any = onednn_fault._Detour(16)
    plain, made.calls = made.plain, []

    class Noting:
        def call_boxed(self, keys: Any, *a: Any) -> Any:
            if a[-1][1]:
                made.calls.append(max(a[4]))
            return plain.call_boxed(keys, *a)

    made.plain = Noting()
    yield made
    made.remove()
    if before is not None:
        onednn_fault._detour = onednn_fault._Detour(before.channels)


def layer_and_batch(name: str) -> tuple[Any, Tensor]:
    layer: Any = copy.deepcopy(LAYERS[name][0]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return layer, torch.rand(2, layer.in_channels, 4, 4).contiguous(memory_format=torch.channels_last)


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Of input and parameters, and of the input gradient's norm."""
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *layer.parameters()]
    first = torch.autograd.grad(layer(leaf).pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), inputs)
    return [g.detach() for g in (*first, *second)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore::mwpb_fast.engine.twin.EngineWarning")
def test_gradients_are_those_of_float64(name: str, detour: Any) -> None:
    layer, x = layer_and_batch(name)
    ours = gradients(layer, x)
    for g, right in zip(ours, gradients(copy.deepcopy(layer).double(), x.double()), strict=True):
        assert (g - right).norm() <= 1e-5 * right.norm()
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", LAYERS)
def test_what_goes_wrong_alone_takes_the_detour_and_it_is_said_once(name: str, detour: Any) -> None:
    layer, x = layer_and_batch(name)
    taken, stride = LAYERS[name][1], max(layer.stride)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(x).sum().backward()
    assert detour.calls == [1 if taken else stride] * 2
    assert [w.category for w in told] == [EngineWarning] * taken
    assert not any("\n" in str(w.message) for w in told)
    layer.requires_grad_(False)(x.requires_grad_()).sum().backward()
    assert len(detour.calls) == 2  # an attack asks for no weight gradient


@pytest.mark.filterwarnings("ignore::mwpb_fast.engine.twin.EngineWarning")
def test_compiled_layers_take_it_too(detour: Any) -> None:
    layer, x = layer_and_batch("1x1, stride 2")
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    ours = torch.autograd.grad(torch.compile(layer)(x).square().sum(), list(layer.parameters()))
    assert detour.calls == [1, 1]
    for g, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(g, right)


@pytest.mark.parametrize(
    ("has", "limit", "floats"),
    [
        (("avx2", "avx512"), "", 16),
        (("avx2", "avx512"), "avx512_core", 16),
        (("avx2", "avx512"), "AVX2", 8),
        (("avx2", "avx512"), "AVX2_VNNI_2", 8),
        (("avx2", "avx512"), "AVX", 0),
        (("avx2",), "", 8),
        (("avx2",), "AVX512_CORE", 8),
        (("avx2",), "SSE41", 0),
        ((), "", 0),
    ],
)
def test_vectors_of_processors(
    has: tuple[str, ...], limit: str, floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: "avx2" in has)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: "avx512" in has)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert processor.vector_floats() == floats
    assert processor.cpu_has_bf16() == (has == ("avx2", "avx512") and not limit)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", limit)  # its older name
    assert processor.vector_floats() == floats


@pytest.mark.parametrize(
    ("floats", "narrowest"),
    [(16, 16), (8, 8), (0, 1)],
    ids=["AVX-512", "AVX2", "neither"],
)
def test_it_is_there_where_the_fault_can_strike(
    floats: int, narrowest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_fault, "vector_floats", lambda: floats)
    monkeypatch.setattr(onednn_fault, "_Detour", lambda channels: channels)
    for width in (1, 2, 7, 8, 15, 16):
        monkeypatch.setattr(onednn_fault, "_detour", None)
        model = build_model(f"smallresnet-{width}", num_classes=10)
        assert onednn_fault.protect(model) == (width < narrowest)
        assert onednn_fault._detour == (floats if width < narrowest else None)
    meta = build_model("smallresnet-2", num_classes=10).to("meta")
    assert not onednn_fault.protect(meta)  # on another device


@pytest.mark.parametrize("floats", [0, 8, 16])
def test_doctor_tells(floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "vector_floats", lambda: floats)
    found = [finding.detail for finding in doctor.machine() if finding.name == "cpu oneDNN"]
    assert len(found) == (floats > 0)
    assert all(f"fewer than {floats} input channels" in detail for detail in found)


STEPS = """
import torch
from mwpb_fast.attacks import pgd
from mwpb_fast.budgets import fixed
from mwpb_fast.config import OptimConfig, PrecisionConfig
from mwpb_fast.engine.net import EagerNet
from mwpb_fast.engine.precision import make_precision
from mwpb_fast.method import Batch, Method
from mwpb_fast.models import build_model
from mwpb_fast.objectives import at
from mwpb_fast.optim import make_optimizer
from mwpb_fast.perturbations import none
from mwpb_fast.step import Step

method = Method(
    budget=fixed.Config().build(),
    attack=pgd.Config(steps=0, start="none").build(),
    objective=at.Config().build(),
    perturb=none.Config().build(),
)

def gradients(channels_last):
    torch.manual_seed(0)
    precision = make_precision(PrecisionConfig(device="cpu", channels_last=channels_last))
    model = build_model("smallresnet-2", num_classes=10).to(memory_format=precision.memory_format)
    x, y, index = torch.rand(3, 3, 64, 64), torch.arange(3), torch.arange(3)
    step = Step(
        model=model,
        net=EagerNet(model, precision),
        optimizer=make_optimizer(model, OptimConfig(lr=0.01)),
        precision=precision,
    )
    for _ in range(3):
        step(Batch(x, y, index), torch.tensor([1]), method)
    return [p.grad for p in model.parameters()]

for ours, right in zip(gradients(True), gradients(False), strict=True):
    assert (ours - right).norm() <= 1e-3 * right.norm(), (ours, right)
print("right")
"""


@pytest.mark.parametrize("limit", ["AVX2", "ALL"])
def test_training_steps_of_a_narrow_model_are_right(limit: str) -> None:
    """In a process of its own: where the fault strikes it kills, or never ends."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": limit, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", STEPS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert (run.returncode, run.stdout) == (0, "right\n"), run.stderr
    assert len(run.stderr.splitlines()) == (processor.vector_floats() > 0)
